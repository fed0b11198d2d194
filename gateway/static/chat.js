// The conversation: text as it comes, and what each answer cost.

import { stream, usd } from "./api.js";

const log = document.querySelector("#messages");
const form = document.querySelector("#form");
const prompt = document.querySelector("#prompt");
const send = document.querySelector("#send");
let conversation = [];
let running = null;

function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const body = document.createElement("p");
  body.textContent = text;
  const meta = document.createElement("div");
  meta.className = "meta";
  box.append(body, meta);
  log.querySelector(".hint")?.remove();
  log.append(box);
  log.scrollTop = log.scrollHeight;
  return { body, meta };
}

function summary(receipt) {
  const parts = [usd(receipt.cost_usd)];
  if (receipt.ttft_ms !== null) parts.push(`first token ${(receipt.ttft_ms / 1e3).toFixed(2)} s`);
  if (receipt.tpot_ms) parts.push(`${(1e3 / receipt.tpot_ms).toFixed(1)} tokens/s`);
  if (receipt.cold_start_ms > 0) parts.push(`cold start ${(receipt.cold_start_ms / 1e3).toFixed(2)} s`);
  parts.push(`${receipt.remote_calls} expert calls`);
  return parts.join(" · ");
}

export function setUp(model, onAnswer) {
  async function answer(text) {
    show("user", text);
    conversation.push({ role: "user", content: text });
    const { body, meta } = show("assistant", "");
    running = new AbortController();
    send.textContent = "Stop";
    meta.textContent = "…";
    try {
      const request = { model, messages: conversation, stream: true };
      for await (const { comment, data } of stream("/v1/chat/completions", request, running.signal)) {
        if (comment) meta.textContent = comment;
        body.textContent += data?.choices[0]?.delta.content ?? "";
        if (data?.x_remoe) meta.textContent = summary(data.x_remoe);
        log.scrollTop = log.scrollHeight;
      }
      conversation.push({ role: "assistant", content: body.textContent });
    } catch (error) {
      const stopped = error.name === "AbortError";
      meta.textContent = stopped ? "stopped" : error.message;
      meta.classList.toggle("error", !stopped);
      conversation.pop();
    }
    running = null;
    send.textContent = "Send";
    onAnswer();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return running.abort();
    const text = prompt.value.trim();
    if (!text) return;
    prompt.value = "";
    answer(text);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  document.querySelector("#clear").addEventListener("click", () => {
    running?.abort();
    conversation = [];
    log.replaceChildren();
    prompt.focus();
  });
}
