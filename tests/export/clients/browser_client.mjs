// Drops a picture on the example page in Chromium, by
// `node browser_client.mjs NODE_MODULES CHROMIUM URL PICTURE SCREENSHOT OUTPUTS`.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";

const [modules, executablePath, url, picture, screenshot, outputsFile] =
  process.argv.slice(2);
const { chromium } = createRequire(join(modules, "index.js"))("playwright-core");

const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  headless: true,
  viewport: { width: 900, height: 1000 },
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const errors = [];
try {
  const page = await context.newPage();
  page.on("pageerror", (error) => errors.push(String(error)));
  const says = (text) =>
    page.waitForFunction(
      (t) => {
        const status = document.querySelector("#status");
        if (status.classList.contains("error") && !t.includes("not a picture")) {
          throw new Error(status.textContent);
        }
        return status.textContent.includes(t);
      },
      text,
      { timeout: 120000 },
    );
  const dropFile = (name, type, bytes) =>
    page.evaluate(
      ({ name, type, base64 }) => {
        const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], name, { type }));
        document
          .querySelector("#drop")
          .dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
      },
      { name, type, base64: bytes.toString("base64") },
    );

  await page.goto(url);
  await says("Ready");
  // A file that is no picture is named, and the page goes on.
  await dropFile("notes.txt", "text/plain", Buffer.from("no picture"));
  await says("notes.txt is not a picture");
  await dropFile(basename(picture), "image/png", readFileSync(picture));
  await says(" ms on ");
  const results = await page.evaluate(() => ({
    status: document.querySelector("#status").textContent,
    backend: tf.getBackend(),
    probabilities: Array.from(window.result.probabilities),
    maps: Array.from(window.result.maps),
    mapsShape: [window.result.tokens, window.result.mapHeight, window.result.mapWidth],
    classes: Array.from(document.querySelectorAll("#classes tbody tr"), (row) =>
      Array.from(row.cells, (cell) => cell.textContent),
    ),
    // What was drawn: the picture, then the map of each token over it.
    canvases: Array.from(document.querySelectorAll("canvas"), (canvas) => {
      const { data } = canvas
        .getContext("2d")
        .getImageData(0, 0, canvas.width, canvas.height);
      return { width: canvas.width, height: canvas.height, pixels: Array.from(data) };
    }),
  }));
  await page.screenshot({ path: screenshot, fullPage: true });
  writeFileSync(outputsFile, JSON.stringify({ ...results, errors }));
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
