// The figures with controls, one for each chapter that has one.
(() => {
  const { alphaBar, conduction, denoiser, diffuse, gaussian, guided, levels, posterior, psnr, range, LAWS, SAMPLERS } = sliderMaths;
  const { add, element, picture, plot } = sliders;
  const shares = (bytes) => Float64Array.from(bytes, (byte) => byte / 255);
  const percent = (share) => (share < 1e-6 ? "less than 0.0001 %" : `${Number((100 * share).toPrecision(2))} %`);
  const decimals = (count) => (x) => x.toFixed(count);
  const power = (x) => 10 ** x;

  // --- chapter 04: a picture dissolves -------------------------------------------------------------

  const RECIPES = {
    linear: "linear (DDPM)", scaled_linear: "scaled linear (Stable Diffusion)", sigmoid_ramp: "sigmoid ramp of β",
    cosine: "cosine", sigmoid: "sigmoid ᾱ",
  };

  add("schedule", "A noise schedule and what it does to a picture", {
    recipe: { label: "Recipe", options: RECIPES, start: "linear" },
    last: { label: "Last variance β max", min: -3, max: -0.7, step: 0.05, start: -1.7, value: (x) => Number(power(x).toPrecision(2)) },
    steps: { label: "Steps T", min: 10, max: 1000, step: 10, start: 1000 },
  }, (stage) => {
    const curve = plot(stage, {
      label: "ᾱ, the share of the picture, against time; dashed: linear with 1,000 steps up to 0.02", x: [0, 1], y: [0, 1],
      xTicks: { 0: "0", 0.5: "T/2", 1: "T" }, yTicks: { 0: "0 %", 0.5: "50 %", 1: "100 %" }, xName: "time", yName: "picture left (ᾱ)",
    });
    const strip = element("div", { class: "slider-strip" }), film = range(6, () => picture(strip, 64, 64));
    const cat = shares(sliderPictures.cat).map((x) => 2 * x - 1), noise = gaussian(0, cat.length);
    const line = (bar) => [[0, 1], ...bar.map((left, t) => [(t + 1) / bar.length, left])];
    stage.append(strip);
    curve.lines("other", [line(alphaBar("linear", 1000, 0.02))]);
    return ({ recipe, last, steps }) => {
      const bar = alphaBar(recipe, steps, last), times = range(6, (i) => Math.round((i * (steps - 1)) / 5));
      stage.enable("last", recipe !== "cosine" && recipe !== "sigmoid");
      curve.lines("curve", [line(bar)]);
      curve.dots("stops", times.map((t) => [(t + 1) / steps, bar[t]]));
      times.forEach((t, i) => {
        const [alpha, sigma] = [Math.sqrt(bar[t]), Math.sqrt(1 - bar[t])];
        film[i](cat.map((x, j) => (alpha * x + sigma * noise[j] + 1) / 2), `t = ${t}\n${Math.round(100 * bar[t])} %`);
      });
      return `After the last step ${percent(bar[steps - 1])} of the variance is still picture.`;
    };
  });

  // --- chapter 02: noise goes, edges stay ----------------------------------------------------------

  const SIZE = [128, 96];

  add("edges", "Perona and Malik's filter on a noisy picture", {
    law: { label: "Law of conduction", options: Object.fromEntries(Object.keys(LAWS).map((name) => [name, name])), start: "quadratic" },
    contrast: { label: "Contrast K", min: -2.5, max: 0, step: 0.05, start: -1, value: power, show: decimals(3) },
    time: { label: "Time t", min: 0, max: 20, step: 0.25, start: 4 },
  }, (stage) => {
    const clean = shares(sliderPictures.coins), noisy = shares(sliderPictures.noisyCoins);
    const [before, after, open, truth] = range(4, () => picture(stage, ...SIZE));
    before(noisy, "with noise");
    truth(clean, "the truth");
    return ({ law, contrast, time }) => {
      const u = diffuse(noisy, ...SIZE, { law, contrast, time });
      after(u, `after time ${time}`);
      open(conduction(u, ...SIZE, { law, contrast }), "white: heat flows");
      return `Likeness to the truth: ${psnr(u, clean).toFixed(1)} dB; it was ${psnr(noisy, clean).toFixed(1)} dB with the noise.`;
    };
  });

  // --- chapters 09 and 15: points flow -------------------------------------------------------------

  const CLEAN = { alpha: 1, sigma: 0 }, COSINE = alphaBar("cosine", 1000);
  const around = (count, radius, variance) => range(count, (i) => {
    const angle = (2 * Math.PI * i) / count + Math.PI / 2;
    return [radius * Math.cos(angle), radius * Math.sin(angle), variance];
  });
  const points = (flat) => range(flat.length / 2, (i) => [flat[2 * i], flat[2 * i + 1]]);

  /** Points of some bells, as many of each. */
  const drawn = (bells, count) => points(gaussian(9, 2 * count * bells.length)).map(([x, y], i) => {
    const [meanX, meanY, variance] = bells[i % bells.length];
    return [meanX + Math.sqrt(variance) * x, meanY + Math.sqrt(variance) * y];
  });

  /** All states of a sampler, from the noise to the end. */
  function walk(sampler, denoise, noise, steps) {
    let seed = 1;
    return [noise, ...SAMPLERS[sampler](denoise, noise, levels(COSINE, steps), (count) => gaussian(seed++, count))];
  }

  /** The plane with real points in grey; returns a function that draws the states up to a share of the way. */
  function plane(stage, label, real) {
    const drawing = plot(stage, { label, x: [-2.4, 2.4], y: [-2.4, 2.4], width: 240, height: 240 });
    drawing.dots("real", real);
    return (states, share) => {
      const place = share * (states.length - 1), whole = Math.min(Math.floor(place), states.length - 2), part = place - whole;
      const here = states[whole].map((value, i) => value + part * (states[whole + 1][i] - value));
      const path = [...states.slice(0, whole + 1), here].map((state) => points(state.slice(0, 80)));
      drawing.lines("paths", path[0].map((_, i) => path.map((state) => state[i])));
      drawing.dots("points", points(here));
    };
  }

  const WAY = { label: "Way from noise", min: 0, max: 1, step: 0.01, start: 1, show: (x) => `${Math.round(100 * x)} %`, play: true };

  add("samplers", "Samplers that carry points from noise to five heaps", {
    sampler: { label: "Sampler", options: { euler: "DDIM (Euler)", heun: "Heun", dpmpp_2m: "DPM-Solver++(2M)", ddpm: "DDPM" }, start: "euler" },
    steps: { label: "Steps", min: 1, max: 64, start: 4 },
    way: WAY,
  }, (stage) => {
    const heaps = around(5, 1.4, 0.01), noise = gaussian(0, 300), exact = denoiser(heaps);
    const draw = plane(stage, "Points of the plane and their paths from noise to five heaps", drawn(heaps, 60));
    const chart = plot(stage, {
      label: "Distance from where the exact path ends, against questions asked, for three samplers", x: [0, 6], y: [-2.5, 0.5],
      xTicks: { 0: "1", 2: "4", 4: "16", 6: "64" }, yTicks: { "-2": "0.01", "-1": "0.1", 0: "1" }, xName: "questions asked", yName: "distance", width: 240, height: 240,
    });
    let questions = 0;
    const counted = (x, level) => { questions += 1; return exact(x, level); };
    const fine = walk("heun", exact, noise, 200).at(-1);
    const run = (sampler, steps) => {
      questions = 0;
      const states = walk(sampler, counted, noise, steps), end = states.at(-1);
      const far = Math.sqrt(end.reduce((sum, value, i) => sum + (value - fine[i]) ** 2, 0) / (end.length / 2));
      return { states, far, spot: [Math.log2(questions), Math.log10(far)] };
    };
    const curves = Object.fromEntries(["euler", "heun", "dpmpp_2m"].map(
      (sampler) => [sampler, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64].map((steps) => run(sampler, steps).spot)
        .filter(([logQuestions]) => logQuestions <= 6)]));
    chart.lines("other", Object.values(curves));
    return ({ sampler, steps, way }) => {
      const { states, far, spot } = run(sampler, steps);
      draw(states, way);
      chart.lines("curve", curves[sampler] ? [curves[sampler]] : []);
      chart.dots("stops", curves[sampler] ? [spot] : []);
      const asked = `${questions} question${questions === 1 ? "" : "s"} to the denoiser. `;
      return asked + (curves[sampler] ? `The points end ${far.toFixed(3)} from the exact path.` : "It follows no path, so it has no distance from one.");
    };
  });

  add("guidance", "Guidance pushes points towards one of three labels", {
    scale: { label: "Guidance scale s", min: 0, max: 16, step: 0.5, start: 1 },
    late: { label: "beyond 1 only late (t ≤ 400)" },
    way: WAY,
  }, (stage) => {
    const [tight, loose] = [around(3, 1.4, 0.02), around(3, 0.5, 0.08)], world = [...tight, ...loose], label = [tight[0], loose[0]];
    const draw = plane(stage, "Points of the plane and their paths; in grey the real points of three labels", drawn(world, 60));
    const noise = gaussian(1, 400), [asked, plain] = [denoiser(label), denoiser(world)];
    const mean = (flat, value) => points(flat).reduce((sum, [x, y]) => sum + value(x, y), 0) / (flat.length / 2);
    return ({ scale, late, way }) => {
      const states = walk("dpmpp_2m", guided(asked, plain, ({ t }) => (late && t > 400 ? Math.min(scale, 1) : scale)), noise, 25);
      draw(states, way);
      const sure = mean(states.at(-1), (x, y) => { const p = posterior(world, x, y, CLEAN); return p[0] + p[3]; });
      const near = mean(states.at(-1), (x, y) => posterior(label, x, y, CLEAN)[1]);
      return `At the end the classifier is ${Math.round(100 * sure)} % sure of the upper label; ${Math.round(100 * near)} % of the points `
        + "belong to its loose heap, where half of the real ones are.";
    };
  });
})();
