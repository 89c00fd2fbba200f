// The figures with controls, one for each chapter that has one.
(() => {
  const { alphaBar, conduction, diffuse, gaussian, psnr, range, LAWS } = sliderMaths;
  const { add, element, picture, plot } = sliders;
  const shares = (bytes) => Float64Array.from(bytes, (byte) => byte / 255);
  const percent = (share) => `${(100 * share).toPrecision(2).replace(/e.*/, "")} %`;
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
})();
