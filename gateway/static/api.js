// Calls to the gateway: JSON, and answers as event streams.

export const key = document.querySelector("#key");
key.value = localStorage.getItem("remoe-key") ?? "";
key.addEventListener("change", () => localStorage.setItem("remoe-key", key.value));

function headers(more = {}) {
  return key.value ? { authorization: `Bearer ${key.value}`, ...more } : more;
}

export async function get(path) {
  const reply = await fetch(path, { headers: headers() });
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error?.message ?? `HTTP ${reply.status}`);
  return body;
}

// Yields {comment} while the model wakes, and {data} for each chunk; throws what the server says.
export async function* stream(path, body, signal) {
  const reply = await fetch(path, {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith(":")) yield { comment: event.slice(1).trim() };
      else if (event === "data: [DONE]") return;
      else if (event.startsWith("data: ")) {
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new Error(data.error.message);
        yield { data };
      }
    }
  }
}

export function usd(amount) {
  if (amount === null || amount === undefined) return "cost unknown";
  return "$" + (amount >= 0.01 ? amount.toFixed(4) : amount.toPrecision(3));
}
