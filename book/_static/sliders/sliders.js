// Figures with controls for the pages of the book: `<div data-slider="name">` becomes what `sliders.add("name", …)` describes.
const sliders = (() => {
  const still = matchMedia("(prefers-reduced-motion: reduce)"), SVG = "http://www.w3.org/2000/svg";

  function element(tag, attributes = {}, ...children) {
    const made = tag === "svg" || tag === "path" || tag === "text" ? document.createElementNS(SVG, tag) : document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    made.append(...children);
    return made;
  }

  // --- controls: each has a name, what is beside it, `read`, and the input to listen to -------------

  /** A slider. `value` makes of its position what the figure reads, `show` what the reader sees. */
  function slide(id, { label, min, max, step = 1, start, value = Number, show = (x) => String(x), play = false }) {
    const input = element("input", { type: "range", id, min, max, step, value: start }), output = element("output", { for: id });
    const read = () => {
      const now = value(Number(input.value));
      output.textContent = show(now);
      input.setAttribute("aria-valuetext", output.textContent);
      return now;
    };
    const parts = [element("label", { for: id }, label), output, input];
    if (play) parts.push(playButton(input));
    return { input, read, box: element("div", { class: "slider-control" }, ...parts) };
  }

  /** A button that moves a slider from end to end in two seconds; not for readers who asked for less motion. */
  function playButton(input) {
    const button = element("button", { type: "button", class: "slider-play" }, "Play");
    button.hidden = still.matches;
    button.addEventListener("click", () => {
      const began = performance.now(), [min, max] = [Number(input.min), Number(input.max)];
      const move = (now) => {
        const share = Math.max(0, Math.min(1, (now - began) / 2000));
        input.value = min + share * (max - min);
        input.dispatchEvent(new Event("input"));
        if (share < 1) requestAnimationFrame(move);
      };
      requestAnimationFrame(move);
    });
    return button;
  }

  function choose(id, { label, options, start }) {
    const input = element("select", { id }, ...Object.entries(options).map(([value, text]) => element("option", { value }, text)));
    input.value = start;
    return { input, read: () => input.value, box: element("div", { class: "slider-control" }, element("label", { for: id }, label), input) };
  }

  function tick(id, { label }) {
    const input = element("input", { type: "checkbox", id });
    return { input, read: () => input.checked, box: element("div", { class: "slider-control" }, input, element("label", { for: id }, label)) };
  }

  const control = (id, facts) => (facts.options ? choose : "min" in facts ? slide : tick)(id, facts);

  // --- what a figure draws on ----------------------------------------------------------------------

  /** Axes from x[0] to x[1] and y[0] to y[1], with `ticks` of { value: text }; lines and dots are styled by their class. */
  function plot(stage, { label, x, y, xTicks = {}, yTicks = {}, xName = "", yName = "", width = 320, height = 190 }) {
    const [left, right, top, bottom] = yName ? [54, 10, 12, 32] : [6, 6, 6, 6];
    const across = (value) => left + ((value - x[0]) / (x[1] - x[0])) * (width - left - right);
    const down = (value) => height - bottom - ((value - y[0]) / (y[1] - y[0])) * (height - top - bottom);
    const words = (place, text, anchor) => element("text", { ...place, "text-anchor": anchor }, text);
    const frame = element("path", { class: "slider-frame", d: `M${left},${top}V${height - bottom}H${width - right}V${top}Z` });
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, frame,
      ...Object.entries(xTicks).map(([at, text]) => words({ x: across(at), y: height - bottom + 13 }, text, "middle")),
      ...Object.entries(yTicks).map(([at, text]) => words({ x: left - 5, y: down(at) + 4 }, text, "end")),
      words({ x: (left + width - right) / 2, y: height - 4 }, xName, "middle"),
      words({ transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)` }, yName, "middle"));
    const paths = {};
    const draw = (name, d) => {
      if (!paths[name]) svg.append((paths[name] = element("path", { class: `slider-${name}` })));
      paths[name].setAttribute("d", d);
    };
    const at = ([a, b]) => `${across(a).toFixed(1)},${down(b).toFixed(1)}`;
    stage.append(svg);
    return {
      lines: (name, lines) => draw(name, lines.map((points) => `M${points.map(at).join("L")}`).join("")),
      dots: (name, points) => draw(name, points.map((point) => `M${at(point)}h0`).join("")),
    };
  }

  /** A picture of width × height pixels with words below it; returns a function that paints shares from 0 to 1. */
  function picture(stage, width, height) {
    const canvas = element("canvas", { width, height, role: "img" }), words = element("figcaption");
    stage.append(element("figure", {}, canvas, words));
    return (values, text) => {
      const pixels = new ImageData(width, height), channels = values.length / (width * height);
      for (let i = 0; i < width * height; i++) {
        for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = Math.round(255 * values[channels * i + (channels === 3 ? c : 0)]);
        pixels.data[4 * i + 3] = 255;
      }
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      canvas.setAttribute("aria-label", (words.textContent = text));
    };
  }

  // --- mounting ------------------------------------------------------------------------------------

  const figures = {};

  /** `build(stage)` lays the figure out and returns `draw(values)`, which draws it and returns a sentence about it. */
  const add = (name, title, controls, build) => { figures[name] = { title, controls, build }; };

  function mount(root) {
    const name = root.dataset.slider, { title, controls, build } = figures[name];
    const inputs = Object.fromEntries(Object.entries(controls).map(([key, facts]) => [key, control(`${name}-${key}`, facts)]));
    const stage = element("div", { class: "slider-stage" }), says = element("p", { class: "slider-says", "aria-live": "polite" });
    stage.enable = (key, on) => { inputs[key].input.disabled = !on; };
    const draw = build(stage);
    let waiting = false;
    const redraw = () => {
      waiting = false;
      const words = draw(Object.fromEntries(Object.entries(inputs).map(([key, { read }]) => [key, read()])));
      if (says.textContent !== words) says.textContent = words;
    };
    for (const { input } of Object.values(inputs)) {
      input.addEventListener("input", () => {
        if (!waiting) requestAnimationFrame(redraw);  // once for each frame that the screen shows
        waiting = true;
      });
    }
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", title);
    root.replaceChildren(element("div", { class: "slider-controls" }, ...Object.values(inputs).map(({ box }) => box), says), stage);
    redraw();
  }

  addEventListener("DOMContentLoaded", () => document.querySelectorAll("[data-slider]").forEach(mount));
  return { add, element, picture, plot };
})();
