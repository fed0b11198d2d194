// OpenAI's npm client against a gateway: node conformance.mjs BASE_URL MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 20_000 });
const messages = [{ role: "user", content: "Hello" }];

const checks = {
  async "a whole chat answer"() {
    const reply = await client.chat.completions.create({ model, messages });
    assert.equal(reply.object, "chat.completion");
    assert.equal(reply.choices[0].message.role, "assistant");
    assert.equal(reply.choices[0].finish_reason, "stop");
    assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
    assert.ok(reply.x_remoe.plan_id);
  },
  async "a streamed chat answer, usage and all"() {
    const whole = await client.chat.completions.create({ model, messages });
    const stream = await client.chat.completions.create({
      model, messages, stream: true, stream_options: { include_usage: true },
    });
    let text = "";
    let last;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      last = chunk;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(last.choices, []);
    assert.deepEqual(last.usage, whole.usage);
  },
  async "the client's own stream helper"() {
    const stream = client.chat.completions.stream({ model, messages, n: 2 });
    const reply = await stream.finalChatCompletion();
    assert.equal(reply.choices.length, 2);
  },
  async "log-probabilities with bytes"() {
    const reply = await client.chat.completions.create({
      model, messages, logprobs: true, top_logprobs: 2,
    });
    const content = reply.choices[0].logprobs.content;
    const bytes = content.flatMap((entry) => entry.bytes);
    assert.ok(new TextDecoder().decode(Uint8Array.from(bytes)).includes("Hello"));
    assert.equal(content[0].top_logprobs.length, 2);
  },
  async "text completions, echo and several prompts"() {
    const reply = await client.completions.create({
      model, prompt: ["Hello", " world"], echo: true, logprobs: 1, max_tokens: 2,
    });
    assert.deepEqual(reply.choices.map((choice) => choice.index), [0, 1]);
    assert.ok(reply.choices[1].text.startsWith(" world"));
    assert.equal(reply.choices[0].logprobs.token_logprobs[0], null);
  },
  async "responses, whole and streamed"() {
    const whole = await client.responses.create({ model, input: "Hello" });
    assert.equal(whole.status, "completed");
    const stream = client.responses.stream({ model, input: "Hello" });
    const reply = await stream.finalResponse();
    assert.equal(reply.output_text, whole.output_text);
    assert.equal(reply.usage.total_tokens, whole.usage.total_tokens);
  },
  async "models, one of which has a slash in its name"() {
    const listed = [];
    for await (const one of client.models.list()) listed.push(one);
    assert.deepEqual(await client.models.retrieve(model), listed[0]);
  },
  async "error classes, codes and params"() {
    const bad = client.chat.completions.create({ model, messages, temperature: 3 });
    await assert.rejects(bad, (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.deepEqual([error.status, error.param, error.code], [400, "temperature", "invalid_value"]);
      return true;
    });
    await assert.rejects(
      client.chat.completions.create({ model: "gpt-5", messages }),
      (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
  },
  async "a stream that is left early"() {
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break;
    }
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok ${name}`);
}
