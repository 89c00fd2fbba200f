// What the sliders compute: the book's own algorithms, once more, in plain JavaScript. Nothing here knows about the page.
// Tests compare each with Python. (One classic script and one name, so that pages opened as files have it too.)
const sliderMaths = (() => {
  const range = (count, f) => Array.from({ length: count }, (_, i) => f(i));
  const linspace = (from, to, count) => range(count, (i) => from + ((to - from) * i) / Math.max(1, count - 1));
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));

  // --- chapter 04: schedules ---------------------------------------------------------------------

  /** Variances whose running product follows a curve over the time from 0 to 1; each at most 0.999. */
  const following = (curve, steps) => range(steps, (i) => Math.min(0.999, 1 - curve((i + 1) / steps) / curve(i / steps)));

  const falling = (time) => (sigmoid(3) - sigmoid(6 * time - 3)) / (sigmoid(3) - sigmoid(-3));

  /** The recipes for β: functions of the number of steps and, for the first three, of the last variance. */
  const BETAS = {
    linear: (steps, last) => linspace(1e-4, last, steps),
    scaled_linear: (steps, last) => linspace(Math.sqrt(0.00085), Math.sqrt(last), steps).map((root) => root * root),
    sigmoid_ramp: (steps, last) => linspace(-6, 6, steps).map((x) => 1e-4 + (last - 1e-4) * sigmoid(x)),
    cosine: (steps) => following((time) => Math.cos(((time + 0.008) / 1.008) * (Math.PI / 2)) ** 2, steps),
    sigmoid: (steps) => following(falling, steps),
  };

  /** ᾱ after each step: the running product of 1 - β. */
  function alphaBar(recipe, steps, last) {
    let left = 1;
    return BETAS[recipe](steps, last).map((beta) => (left *= 1 - beta));
  }

  /** `count` standard normal numbers, the same for the same seed (mulberry32, then Box and Muller). */
  function gaussian(seed, count) {
    let state = seed;
    const uniform = () => {
      state = (state + 0x6d2b79f5) | 0;
      let x = Math.imul(state ^ (state >>> 15), 1 | state);
      x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
      return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 2 ** 32;
    };
    return Float64Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
  }

  // --- chapter 02: Perona and Malik --------------------------------------------------------------

  /** The laws of conduction: functions of (slope / contrast)². "heat" lets every border conduct. */
  const LAWS = {
    quadratic: (s) => 1 / (1 + s),
    exponential: (s) => Math.exp(-s),
    charbonnier: (s) => 1 / Math.sqrt(1 + s),
    tukey: (s) => Math.max(0, 1 - s) ** 2,
    weickert: (s) => -Math.expm1(-3.31488 / Math.max(0.1, s) ** 4),
    heat: () => 1,
  };

  /** Call `visit` with the two pixels at each border of a picture whose rows follow one another. */
  function eachBorder(width, height, visit) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const i = y * width + x;
        if (x + 1 < width) visit(i, i + 1);
        if (y + 1 < height) visit(i, i + width);
      }
    }
  }

  /** `filtering.diffuse` with scheme="explicit": a grey picture after `time`, in the longest stable steps. */
  function diffuse(picture, width, height, { time, contrast, law }) {
    const conducts = LAWS[law], steps = Math.ceil((time / 0.25) * (1 - 1e-9)), u = Float64Array.from(picture);
    for (let step = 0; step < steps; step++) {
      const rate = new Float64Array(u.length);
      eachBorder(width, height, (i, j) => {
        const slope = u[j] - u[i], flow = slope * conducts((slope / contrast) ** 2);
        rate[i] += flow;
        rate[j] -= flow;
      });
      for (let i = 0; i < u.length; i++) u[i] += (time / steps) * rate[i];
    }
    return u;
  }

  /** How well each pixel's borders conduct, on average: 1 where the picture is flat. */
  function conduction(picture, width, height, { contrast, law }) {
    const sum = new Float64Array(picture.length), count = new Float64Array(picture.length);
    eachBorder(width, height, (i, j) => {
      const share = LAWS[law](((picture[j] - picture[i]) / contrast) ** 2);
      for (const k of [i, j]) {
        sum[k] += share;
        count[k] += 1;
      }
    });
    return sum.map((total, i) => total / count[i]);
  }

  /** Peak signal-to-noise ratio in decibels, for pictures in [0, 1]. */
  const psnr = (a, b) => -10 * Math.log10(a.reduce((sum, value, i) => sum + (value - b[i]) ** 2, 0) / a.length);

  // --- chapter 03: points of the plane, in bells [x, y, variance] ----------------------------------

  /** Probability of each bell as the origin of a noisy point. */
  function posterior(bells, x, y, { alpha, sigma }) {
    const logs = bells.map(([meanX, meanY, variance]) => {
      const total = alpha ** 2 * variance + sigma ** 2;
      return -((x - alpha * meanX) ** 2 + (y - alpha * meanY) ** 2) / (2 * total) - Math.log(total);
    });
    const top = Math.max(...logs), weights = logs.map((log) => Math.exp(log - top)), sum = weights.reduce((a, b) => a + b);
    return weights.map((weight) => weight / sum);
  }

  /** `GaussianMixture.x0`: mean of the clean points that noisy ones, [x, y, x, y, …], may have come from. */
  function cleanMean(bells, points, level) {
    const x0 = new Float64Array(points.length);
    for (let i = 0; i < points.length; i += 2) {
      posterior(bells, points[i], points[i + 1], level).forEach((weight, k) => {
        const variance = bells[k][2], gain = (level.alpha * variance) / (level.alpha ** 2 * variance + level.sigma ** 2);
        for (const axis of [0, 1]) x0[i + axis] += weight * (bells[k][axis] + gain * (points[i + axis] - level.alpha * bells[k][axis]));
      });
    }
    return x0;
  }

  /** The perfect denoiser of some bells: a function of points and a level that answers with picture and noise. */
  const denoiser = (bells) => (x, level) => {
    const x0 = cleanMean(bells, x, level);
    return { x0, eps: x.map((value, i) => (value - level.alpha * x0[i]) / level.sigma) };
  };

  /** `classifier_free`: away from what would come without the wish. `scale` may depend on the level. */
  const guided = (asked, plain, scale) => (x, level) => {
    const [told, untold, s] = [asked(x, level), plain(x, level), scale(level)];
    const push = (part) => told[part].map((value, i) => untold[part][i] + s * (value - untold[part][i]));
    return { x0: push("x0"), eps: push("eps") };
  };

  // --- chapter 09: samplers ------------------------------------------------------------------------

  /** The levels of `steps` trailing steps on a table of ᾱ, and the clean one behind them. */
  function levels(bar, steps) {
    const round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));  // halves to the even neighbour, as in Python
    const noisy = range(steps, (i) => round(bar.length - (i * bar.length) / steps) - 1).map((t) => {
      const [alpha, sigma] = [Math.sqrt(bar[t]), Math.sqrt(1 - bar[t])];
      return { t, alpha, sigma, lambda: Math.log(alpha / sigma) };
    });
    return [...noisy, { t: null, alpha: 1, sigma: 0, lambda: Infinity }];
  }

  const FAINT = -5.1;
  const mix = ({ x0, eps }, level) => x0.map((value, i) => level.alpha * value + level.sigma * eps[i]);
  const pairs = (stops) => range(stops.length - 1, (i) => [stops[i], stops[i + 1]]);

  /** Samplers by their names in `diffusionbook.samplers`: each yields the points after every step. */
  const SAMPLERS = {
    *euler(denoise, x, stops) {
      for (const [now, then] of pairs(stops)) yield x = mix(denoise(x, now), then);
    },
    *heun(denoise, x, stops) {
      for (const [now, then] of pairs(stops)) {
        const answer = denoise(x, now), guess = mix(answer, then);
        if (then.sigma === 0 || now.lambda < FAINT) {
          x = guess;
        } else {
          const again = denoise(guess, then).eps, scale = then.alpha / now.alpha, moved = then.sigma - scale * now.sigma;
          x = x.map((value, i) => scale * value + (moved * (answer.eps[i] + again[i])) / 2);
        }
        yield x;
      }
    },
    *dpmpp_2m(denoise, x, stops) {
      let before = null;
      for (const [now, then] of pairs(stops)) {
        const { x0 } = denoise(x, now), h = then.lambda - now.lambda, last = before?.x0 ?? x0;
        const slope = before && Number.isFinite(h) ? h / (2 * before.h) : 0;
        const [kept, added] = [then.sigma / now.sigma, -then.alpha * Math.expm1(-h)];
        x = x.map((value, i) => kept * value + added * (x0[i] + slope * (x0[i] - last[i])));
        before = { h, x0 };
        yield x;
      }
    },
    *ddpm(denoise, x, stops, noise) {
      for (const [now, then] of pairs(stops)) {
        const { x0 } = denoise(x, now), ratio = Math.min(1, ((now.alpha * then.sigma) / (now.sigma * then.alpha)) ** 2);
        const [kept, added] = [(now.alpha * then.sigma ** 2) / (then.alpha * now.sigma ** 2), then.alpha * (1 - ratio)];
        const fresh = noise(x.length), spread = then.sigma * Math.sqrt(1 - ratio);
        x = x.map((value, i) => kept * value + added * x0[i] + spread * fresh[i]);
        yield x;
      }
    },
  };

  return { BETAS, LAWS, SAMPLERS, alphaBar, conduction, denoiser, diffuse, gaussian, guided, levels, posterior, psnr, range };
})();
