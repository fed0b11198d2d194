// The page: what is awake, what requests cost, and a chat. No build step, no library.

import { get, key, usd } from "./api.js";
import * as balance from "./balance.js";
import * as chat from "./chat.js";
import * as plan from "./plan.js";
import { shape } from "./shape.js";

const PERIOD_MS = 2000;
const CHARTED = 40;
const element = (id) => document.querySelector(`#${id}`);
let selected = null;
let drawn = "";

function showFunctions(state) {
  const list = element("functions");
  if (!state.functions) {
    element("awake").textContent = "";
    list.innerHTML = '<li class="hint"><span></span><span>No local runtime tells of functions here.</span></li>';
    return;
  }
  const awake = state.functions.filter((f) => f.replicas.length).length;
  element("awake").textContent = `${awake} awake, ${state.functions.length - awake} at zero`;
  list.replaceChildren(
    ...state.functions.map((f) => {
      const item = document.createElement("li");
      item.className = f.replicas.length ? "" : "zero";
      const dot = document.createElement("span");
      dot.className = `dot ${f.state.split(" ")[0]}`;
      const name = document.createElement("span");
      name.className = "name";
      name.textContent = f.name.replace(`${state.model}-`, "");
      name.title = f.holds;
      const meta = document.createElement("span");
      meta.className = "meta";
      const wanted = state.balance?.replicas[f.name];
      const held = f.replicas.length ? `${Math.round(f.memory_bytes / 2 ** 20)} MiB` : "";
      meta.textContent = [f.state === "zero" ? "at zero" : f.state, held, wanted === undefined ? "" : `${wanted} wanted`, f.cold_starts ? `${f.cold_starts} cold start${f.cold_starts === 1 ? "" : "s"}` : ""]
        .filter(Boolean)
        .join(" · ");
      item.append(dot, name, meta);
      return item;
    }),
  );
}

function showCosts(requests) {
  const priced = requests.filter((r) => r.receipt.cost).slice(0, CHARTED).reverse();
  const sum = priced.reduce((total, r) => total + r.receipt.cost_usd, 0);
  element("cost-total").textContent = priced.length ? `${usd(sum)} for the last ${priced.length === 1 ? "request" : `${priced.length} requests`}` : "";
  const svg = shape("svg", { viewBox: "0 0 400 100", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", `Cost of the last ${priced.length} requests, ${usd(sum)} together`);
  const top = Math.max(...priced.map((r) => Math.max(r.receipt.cost_usd, r.receipt.resident?.cost_usd ?? 0)), 1e-12);
  const width = 400 / CHARTED;
  priced.forEach((request, index) => {
    const { cost, resident } = request.receipt;
    const x = index * width + 1;
    const main = ((cost.main_gpu_usd + cost.main_cpu_usd) / top) * 96;
    const remote = (cost.remote_usd / top) * 96;
    const bar = { x, width: width - 2 };
    svg.append(shape("rect", { ...bar, class: "main", y: 100 - main, height: main }));
    svg.append(shape("rect", { ...bar, class: "remote", y: 100 - main - remote, height: remote }));
    if (resident?.cost_usd) {
      const y = 100 - (resident.cost_usd / top) * 96;
      svg.append(shape("path", { class: "resident", d: `M${x} ${y}h${width - 2}` }));
    }
  });
  element("cost-chart").replaceChildren(svg);
}

function showRequests(requests) {
  element("rows").replaceChildren(
    ...requests.slice(0, 100).map((request) => {
      const { receipt } = request;
      const row = document.createElement("tr");
      row.setAttribute("aria-selected", request.id === selected);
      const choose = document.createElement("button");
      choose.type = "button";
      choose.textContent = new Date(request.at * 1e3).toLocaleTimeString();
      choose.setAttribute("aria-label", `Explain the plan of the request at ${choose.textContent}`);
      choose.addEventListener("click", () => select(request));
      row.insertCell().append(choose);
      for (const value of [
        `${request.prompt_tokens} + ${request.completion_tokens}`,
        receipt.ttft_ms === null ? "–" : `${(receipt.ttft_ms / 1e3).toFixed(2)} s`,
        receipt.cold_start_ms ? `${(receipt.cold_start_ms / 1e3).toFixed(2)} s` : "–",
        receipt.hit_rate === null ? "–" : `${(100 * receipt.hit_rate).toFixed(0)} %`,
        receipt.cost_usd === null ? "–" : usd(receipt.cost_usd),
      ])
        row.insertCell().textContent = value;
      return row;
    }),
  );
}

async function select(request) {
  selected = request.id;
  for (const row of element("rows").rows) row.setAttribute("aria-selected", "false");
  drawn = "";
  await plan.explain(request);
}

async function refresh({ follow = false } = {}) {
  try {
    const [state, requests] = await Promise.all([get("/dashboard/state"), get("/dashboard/requests")]);
    element("model").textContent = `${state.model} · prices: ${state.price_book} · ${state.open_requests} open`;
    showFunctions(state);
    balance.show(state.balance);
    if (follow && requests.length) await select(requests[0]);
    const mark = `${requests[0]?.id} ${requests.length} ${selected}`;
    if (mark !== drawn) {
      drawn = mark;
      showCosts(requests);
      showRequests(requests);
    }
    return state;
  } catch (error) {
    element("model").textContent = error.message;
    return null;
  }
}

function dark() {
  return document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
}

element("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("remoe-theme", theme);
  plan.redraw();
});
const kept = localStorage.getItem("remoe-theme");
if (kept) document.documentElement.dataset.theme = kept;

async function begin() {
  const state = await refresh();
  if (state === null) return setTimeout(begin, PERIOD_MS);
  chat.setUp(state.model, () => setTimeout(() => refresh({ follow: true }), 100));
  document.body.dataset.ready = "true";
  setInterval(() => document.hidden || refresh(), PERIOD_MS);
}

key.addEventListener("change", () => refresh());
begin();
