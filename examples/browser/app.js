// Runs an exported TokenLearner model on a picture and draws its attention maps.
// `tf` is TensorFlow.js, loaded by index.html.

// What the pixel values 0 and 255 become: `value_range` of the model's training.
const VALUE_RANGE = [-1, 1];
const TOP_CLASSES = 5;
const PICTURE_SIDE = 280;
const MAP_SIDE = 168;

const drop = document.querySelector("#drop");
const file = document.querySelector("#file");
const status = document.querySelector("#status");

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

// The fastest backend that starts, or the one that `?backend=` names. (The WebAssembly
// backend has no einsum, which attention layers are made of.)
async function chooseBackend() {
  const named = new URLSearchParams(location.search).get("backend");
  for (const name of named ? [named] : ["webgl", "cpu"]) {
    if (await tf.setBackend(name).catch(() => false)) return;
  }
  throw new Error(`No TensorFlow.js backend starts: ${named ?? "webgl, cpu"}`);
}

async function loadClassNames() {
  const response = await fetch("model/class_names.txt");
  if (!response.ok) return null;
  return (await response.text()).trimEnd().split("\n");
}

async function load() {
  await chooseBackend();
  const model = await tf.loadGraphModel("model/model.json");
  const { inputs, outputs } = model.modelSignature;
  for (const name of ["probabilities", "attention_maps"]) {
    if (!outputs[name]) {
      throw new Error(`The model has no output "${name}": export it with "explain"`);
    }
  }
  return { model, inputs, outputs, classNames: await loadClassNames() };
}

// Probabilities (classes) and attention maps (tokens, height, width) of a picture.
async function run({ model, inputs, outputs }, picture) {
  const [input] = model.inputs;
  const [, height, width] = input.shape;
  const names = [outputs.probabilities.name, outputs.attention_maps.name];
  const results = tf.tidy(() => {
    const pixels = tf.image.resizeBilinear(
      tf.browser.fromPixels(picture).toFloat(),
      [height, width],
      false,
      true,
    );
    const [low, high] = VALUE_RANGE;
    const images = pixels.mul((high - low) / 255).add(low).expandDims(0);
    return model.execute({ [inputs.images.name]: images }, names);
  });
  const [probabilities, maps] = await Promise.all(results.map((t) => t.data()));
  const [, tokens, mapHeight, mapWidth] = results[1].shape;
  tf.dispose(results);
  return { probabilities, maps, tokens, mapHeight, mapWidth };
}

function fitted(picture, side) {
  const scale = side / Math.max(picture.width, picture.height);
  return [Math.round(picture.width * scale), Math.round(picture.height * scale)];
}

function drawPicture(canvas, picture, side) {
  [canvas.width, canvas.height] = fitted(picture, side);
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
}

// One map as a small transparent picture: from clear to red, least to most attention.
function heat(map, height, width) {
  const low = Math.min(...map);
  const span = Math.max(...map) - low || 1;
  const image = new ImageData(width, height);
  map.forEach((value, index) => {
    const strength = (value - low) / span;
    image.data.set([255, 255 * (1 - strength), 0, 190 * strength], 4 * index);
  });
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawMaps(picture, { maps, tokens, mapHeight, mapWidth }) {
  const size = mapHeight * mapWidth;
  const figures = Array.from({ length: tokens }, (_, token) => {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    drawPicture(canvas, picture, MAP_SIDE);
    const map = heat(maps.slice(token * size, (token + 1) * size), mapHeight, mapWidth);
    const context = canvas.getContext("2d");
    // Light enough below that the colours show on any picture.
    context.fillStyle = "rgba(255, 255, 255, 0.35)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(map, 0, 0, canvas.width, canvas.height);
    const caption = document.createElement("figcaption");
    caption.textContent = `Token ${token}`;
    figure.append(canvas, caption);
    return figure;
  });
  document.querySelector("#maps").replaceChildren(...figures);
}

function listClasses(probabilities, classNames) {
  const order = Array.from(probabilities.keys());
  order.sort((a, b) => probabilities[b] - probabilities[a]);
  const rows = order.slice(0, TOP_CLASSES).map((index) => {
    const row = document.createElement("tr");
    const cells = [classNames?.[index] ?? `class ${index}`, probabilities[index].toFixed(4)];
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  });
  document.querySelector("#classes tbody").replaceChildren(...rows);
}

async function show(loaded, blob) {
  let picture;
  try {
    // Pixels as they are in the file: no colour management, no premultiplied alpha.
    picture = await createImageBitmap(blob, {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    say(`${blob.name ?? "The file"} is not a picture that this browser can read.`, true);
    return;
  }
  say("Running…");
  const start = performance.now();
  const result = await run(loaded, picture);
  const elapsed = performance.now() - start;
  drawPicture(document.querySelector("#picture"), picture, PICTURE_SIDE);
  listClasses(result.probabilities, loaded.classNames);
  drawMaps(picture, result);
  document.querySelector("#results").hidden = false;
  // For scripts that read the numbers off the page.
  window.result = result;
  say(`${blob.name ?? "Picture"}: ${elapsed.toFixed(0)} ms on ${tf.getBackend()}.`);
}

function listen(loaded) {
  const take = (files) => {
    if (files.length) show(loaded, files[0]).catch((error) => say(error.message, true));
  };
  file.addEventListener("change", () => take(file.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files);
  });
}

try {
  listen(await load());
  say(`Ready, on ${tf.getBackend()}.`);
} catch (error) {
  say(error.message, true);
}
