// Runs the painter beside the page, so that the page stays alive while the processor works.
// Hears { caption, seed, steps, guidance }; says { loaded }, { step, picture }, { done, gpu, meter } or { error }.
// Hears { judge: true }; says { loaded }, { similarity, own, others } about the last picture, or { error }.
import { Painter } from "./painter.js";

const HOME = new URL(".", import.meta.url).href.slice(0, -1);
let painter = null, last = null;

const onProgress = (loaded) => self.postMessage({ loaded });

/** Is there a graphics processor for WebGPU, and not only a program that plays one? */
async function hasGraphicsProcessor() {
  const adapter = await navigator.gpu?.requestAdapter();
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

async function load() {
  try {
    if (await hasGraphicsProcessor()) return await Painter.load(HOME, { gpu: true, onProgress });
  } catch (error) {
    console.warn(`The graphics processor can't be used (${error.message}); the other one will paint.`);
  }
  return Painter.load(HOME, { onProgress });
}

async function judge() {
  const similarity = await painter.similarity(last.picture, last.caption, onProgress);
  self.postMessage({ similarity, own: painter.facts.meter.own, others: painter.facts.meter.others });
}

self.onmessage = async ({ data }) => {
  try {
    if (data.judge) return await judge();
    painter ??= await load();
    for await (const { step, guess } of painter.paint(data.caption, data)) {
      last = { caption: data.caption, picture: await painter.decode(guess) };
      self.postMessage({ step, picture: last.picture });
    }
    self.postMessage({ done: true, gpu: painter.gpu, meter: painter.facts.meter.size });
  } catch (error) {
    self.postMessage({ error: error.message });
  }
};
