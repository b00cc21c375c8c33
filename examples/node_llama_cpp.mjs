// A plain program on node-llama-cpp, which knows nothing of adlocal:
//
//     npm install node-llama-cpp
//     adlocal run --bundle bundle/ -- node node_llama_cpp.mjs teacher.gguf "Why is the sky blue?"

import {getLlama, LlamaChatSession} from "node-llama-cpp";

const [modelPath, question] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext();
const session = new LlamaChatSession({contextSequence: context.getSequence(), systemPrompt: "Be brief."});
await session.prompt(question, {temperature: 0, maxTokens: 64, onTextChunk: (text) => process.stdout.write(text)});
console.log();
await llama.dispose();
