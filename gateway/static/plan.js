// One plan explained: layer x expert maps of what was predicted and what came, and its neighbours.

import { get } from "./api.js";

const maps = document.querySelector("#maps");
const text = document.querySelector("#why-text");
const cell = document.querySelector("#cell");
const canvases = ["predicted", "actual"].map((id) => document.querySelector(`#${id}`));
let shown = null;
let cursor = [0, 0];

function draw(canvas, profile) {
  const layers = profile.length;
  const experts = profile[0].length;
  const size = Math.max(2, Math.min(16, Math.floor(1600 / Math.max(layers, experts))));
  canvas.width = experts * size;
  canvas.height = layers * size;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("i");
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = style.getPropertyValue(name);
    return getComputedStyle(probe).color;
  };
  const [hot, frame] = [colour("--main"), colour("--remote")];
  probe.remove();
  const top = Math.max(...profile.map((row) => Math.max(...row)), 1e-9);
  profile.forEach((row, layer) => {
    const remote = new Set(shown.remote[layer]);
    row.forEach((share, expert) => {
      pen.globalAlpha = Math.sqrt(share / top);
      pen.fillStyle = hot;
      pen.fillRect(expert * size, layer * size, size, size);
      pen.globalAlpha = 1;
      if (remote.has(expert) && size > 4) {
        pen.strokeStyle = frame;
        pen.strokeRect(expert * size + 0.5, layer * size + 0.5, size - 1, size - 1);
      }
    });
  });
  canvas.setAttribute("aria-label", `${canvas.id} routing shares, ${layers} layers of ${experts} experts`);
}

function tell() {
  const [layer, expert] = cursor;
  const share = (profile) => (profile ? `${(100 * profile[layer][expert]).toFixed(1)} %` : "unknown");
  const where = shown.remote[layer].includes(expert) ? "remote" : "in the main function";
  cell.textContent = `Layer ${layer}, expert ${expert} (${where}): predicted ${share(shown.predicted)}, actual ${share(shown.actual)}.`;
}

function move(layer, expert) {
  cursor = [
    Math.min(Math.max(layer, 0), shown.predicted.length - 1),
    Math.min(Math.max(expert, 0), shown.predicted[0].length - 1),
  ];
  tell();
}

for (const canvas of canvases) {
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    move(
      Math.floor(((event.clientY - box.top) / box.height) * shown.predicted.length),
      Math.floor(((event.clientX - box.left) / box.width) * shown.predicted[0].length),
    );
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(cursor[0] + step[0], cursor[1] + step[1]);
  });
}

function listNeighbours(neighbours) {
  const box = document.querySelector("#neighbours");
  box.replaceChildren();
  if (!neighbours.length) return;
  const table = document.createElement("table");
  table.createTHead().innerHTML = "<tr><th>similar prompt</th><th>similarity</th><th>weight</th></tr>";
  for (const near of neighbours.slice(0, 8)) {
    const row = table.insertRow();
    row.insertCell().textContent = `#${near.history_id} ${near.topic}`;
    row.insertCell().textContent = near.similarity.toFixed(3);
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.style.width = `${(100 * near.weight).toFixed(1)}%`;
    row.insertCell().append(`${(100 * near.weight).toFixed(1)} %`, bar);
  }
  box.append(table);
}

export function redraw() {
  if (!shown) return;
  draw(canvases[0], shown.predicted);
  if (shown.actual) draw(canvases[1], shown.actual);
}

export async function explain(request) {
  try {
    shown = await get(`/dashboard/requests/${encodeURIComponent(request.id)}`);
  } catch (error) {
    shown = null;
    maps.hidden = true;
    text.textContent = error.message;
    document.querySelector("#neighbours").replaceChildren();
    return;
  }
  const remote = shown.remote.reduce((sum, layer) => sum + layer.length, 0);
  const percent = (rate) => (rate === null ? "unknown" : `${(100 * rate).toFixed(0)} %`);
  const { receipt } = request;
  text.textContent =
    `${remote} experts are remote${shown.policy ? `, and the policy chosen is ${shown.policy}` : ""}. Routes that stay in the main function: ` +
    `${percent(receipt.predicted.hit_rate)} predicted, ${percent(receipt.hit_rate)} actual. ` +
    (shown.neighbours.length
      ? `The prediction rests on ${shown.neighbours.length} similar prompts:`
      : "No similar prompt was known, so the prediction is even.");
  document.querySelector("#why-id").textContent = shown.plan_id;
  maps.hidden = false;
  cursor = [0, 0];
  redraw();
  listNeighbours(shown.neighbours);
}
