// llama.cpp through node-llama-cpp: one JSON request on the command line, one JSON answer on the standard output.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const {folder, path, prompts, texts, steps} = JSON.parse(process.argv[2]);  // folder holds node_modules
const found = createRequire(pathToFileURL(`${folder}/`)).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
const context = await model.createContext({contextSize: 256, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
const sequence = context.getSequence();
const answers = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const tokens = [], logits = [];
    let fed = prompt;
    for (let step = 0; step < steps; step++) {  // greedy: each time the likeliest token
        const last = [fed.at(-1), {generateNext: {token: true, logits: true, options: {temperature: 0}}}];
        const outputs = await sequence.controlledEvaluate([...fed.slice(0, -1), last]);
        const {token, logits: found} = outputs.at(-1).next;
        tokens.push(token);
        logits.push([...found].sort(([a], [b]) => a - b).map(([, logit]) => logit));
        fed = [token];
    }
    answers.push({tokens, logits});
}
console.log(JSON.stringify({answers, texts: texts.map((text) => model.tokenize(text, true))}));
await llama.dispose();
