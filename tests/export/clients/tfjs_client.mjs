// TensorFlow.js in Node: `node tfjs_client.mjs NODE_MODULES MODEL_FOLDER INPUTS OUTPUTS`.
// INPUTS: {"shape": [...], "values": [...]}. OUTPUTS: the same by output name.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, folder, inputsFile, outputsFile] = process.argv.slice(2);
const tf = createRequire(join(modules, "index.js"))("@tensorflow/tfjs");

const handler = {
  load: async () => {
    const description = JSON.parse(readFileSync(join(folder, "model.json")));
    const files = description.weightsManifest.flatMap((group) => group.paths);
    const bytes = Buffer.concat(files.map((file) => readFileSync(join(folder, file))));
    return {
      modelTopology: description.modelTopology,
      signature: description.signature,
      weightSpecs: description.weightsManifest.flatMap((group) => group.weights),
      weightData: bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length),
    };
  },
};

await tf.setBackend("cpu");
const model = await tf.loadGraphModel(handler);
const { shape, values } = JSON.parse(readFileSync(inputsFile));
const names = Object.keys(model.modelSignature.outputs);
const results = model.execute(
  { [model.modelSignature.inputs.images.name]: tf.tensor(values, shape) },
  names.map((name) => model.modelSignature.outputs[name].name),
);
const tensors = [results].flat();
const outputs = {};
for (const [index, name] of names.entries()) {
  const tensor = tensors[index];
  outputs[name] = { shape: tensor.shape, values: Array.from(await tensor.data()) };
}
writeFileSync(outputsFile, JSON.stringify(outputs));
