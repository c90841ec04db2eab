// llama.cpp as a process, by the npm package node-llama-cpp: see reply.py.
// node llama_cpp.mjs FOLDER FILE THREADS CONTEXT; FOLDER has node_modules.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const say = (what) => process.stdout.write(JSON.stringify(what) + "\n");
const [folder, file, threads, size] = process.argv.slice(2);
const found = createRequire(join(folder, "any.js")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found).href);

const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logger: () => {}});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const context = await model.createContext({contextSize: +size, batchSize: +size, threads: +threads});
const sequence = context.getSequence();
say({ready: {build: llama.llamaCppRelease.release, system: llama.systemInfo}});

for await (const line of createInterface({input: process.stdin})) {
    const {prompt, new: count} = JSON.parse(line);
    await sequence.clearHistory();
    const started = performance.now();
    let first = 0, last = 0, tokens = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        last = performance.now();
        first ||= last;
        if (++tokens === count) break;
    }
    if (tokens !== count) throw new Error(`${tokens} tokens of ${count}`);
    say({first: (first - started) / 1e3, rest: (last - first) / 1e3});
}
process.exit(0);
