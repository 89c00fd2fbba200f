// The page "Paint": a form, a canvas, and a strip with the steps.
(() => {
  const home = document.currentScript.src.replace(/[^/]*$/, ""), SIDE = 64;

  function start() {
    const root = document.getElementById("painter");
    if (!root) return;
    const part = (name) => root.querySelector(`[name=${name}], .paint-${name}`);
    const [form, says, bar, film] = ["form", "says", "bar", "film"].map(part);
    const say = (text) => { says.textContent = text; };
    if (location.protocol === "file:") {
      root.querySelectorAll("input, button").forEach((control) => { control.disabled = true; });
      say("A browser runs this only for pages that come from a server. In the folder of the book, run "
        + "“python -m http.server --directory _build/html” and open http://localhost:8000/book/paint.html.");
      return;
    }
    for (const name of ["steps", "guidance"]) {
      const show = () => { part(`${name}-value`).textContent = part(name).value; };
      part(name).addEventListener("input", show);
      show();
    }

    /** Put a picture, three planes with values in [-1, 1], on a canvas. */
    function draw(canvas, picture) {
      const pixels = new ImageData(SIDE, SIDE), size = SIDE * SIDE;
      for (let i = 0; i < size; i++) {
        for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = (Math.min(1, Math.max(-1, picture[c * size + i])) + 1) * 127.5;
        pixels.data[4 * i + 3] = 255;
      }
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    }

    function addToFilm(picture, step) {
      const frame = document.createElement("canvas");
      Object.assign(frame, { width: SIDE, height: SIDE, title: `after step ${step}` });
      draw(frame, picture);
      film.append(frame);
    }

    /** Put the similarity beside those of real pictures: how many it beats. */
    function showFit({ similarity, own, others }) {
      const low = Math.min(others[0], own[0], similarity), high = Math.max(others[100], own[100], similarity);
      const place = (value) => `${(100 * (value - low)) / (high - low)}%`;
      const beaten = (percentiles) => Math.max(0, percentiles.filter((value) => value < similarity).length - 1);
      for (const [name, percentiles] of Object.entries({ others, own })) {
        const band = part(`fit-${name}`);
        band.style.left = place(percentiles[5]);
        band.style.width = `calc(${place(percentiles[95])} - ${place(percentiles[5])})`;
      }
      part("fit-here").style.left = place(similarity);
      part("fit-says").textContent = `Similarity ${similarity.toFixed(3)}. That beats ${beaten(others)} % of real pictures with the `
        + `caption of another, and ${beaten(own)} % with their own.`;
      part("fit-scale").hidden = false;
    }

    let worker = null, began = 0, steps = 0;

    function hear({ data }) {
      if (data.loaded !== undefined) {
        bar.value = data.loaded;
        say(`Loading the model: ${Math.round(100 * data.loaded)} %`);
      } else if (data.picture) {
        draw(part("canvas"), data.picture);
        addToFilm(data.picture, data.step);
        bar.value = data.step / steps;
        say(`Step ${data.step} of ${steps}`);
      } else if (data.similarity !== undefined) {
        part("go").disabled = false;
        say("");
        showFit(data);
        root.dataset.state = "judged";
      } else {
        part("go").disabled = false;
        if (data.done) {
          part("fit").hidden = part("judge").disabled = false;
          part("judge").textContent = `How well does it fit? (loads ${Math.ceil(data.meter / 1e6)} MB once)`;
        }
        const seconds = ((performance.now() - began) / 1000).toFixed(1);
        say(data.error ? `That went wrong: ${data.error}. Reload the page to try again.` : `Painted in ${seconds} seconds${data.gpu ? " on the graphics processor" : ""}.`);
        root.dataset.state = data.error ? "failed" : "done";
      }
    }

    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const caption = part("caption").value.trim();
      if (!caption) return say("Say what to paint, for example “red heart, noto style”.");
      if (!worker) {
        worker = new Worker(`${home}worker.js`, { type: "module" });
        worker.onmessage = hear;
        worker.onerror = (error) => hear({ data: { error: error.message || "the worker could not start" } });
      }
      film.replaceChildren();
      part("fit").hidden = part("fit-scale").hidden = true;
      part("fit-says").textContent = "";
      [root.dataset.state, part("go").disabled, began, steps] = ["busy", true, performance.now(), Number(part("steps").value)];
      worker.postMessage({ caption, steps, seed: Number(part("seed").value), guidance: Number(part("guidance").value) });
    });
    part("judge").addEventListener("click", () => {
      [root.dataset.state, part("go").disabled, part("judge").disabled] = ["busy", true, true];
      worker.postMessage({ judge: true });
    });
    root.querySelectorAll(".paint-idea").forEach((idea) => idea.addEventListener("click", () => {
      part("caption").value = idea.textContent;
      if (!part("go").disabled) form.requestSubmit();
    }));
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
