// How loads are balanced: variation and foretold share of each layer, as the last answer told.

import { shape } from "./shape.js";

const box = document.querySelector("#balance");
const percent = (share) => `${(100 * share).toFixed(0)} %`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
let drawn = "";

export function show(balance) {
  box.hidden = !balance;
  const mark = JSON.stringify(balance);
  if (!balance || mark === drawn) return;
  drawn = mark;
  const foretold = balance.overlap.filter((share) => share !== null);
  const replicas = Object.values(balance.replicas).reduce((sum, count) => sum + count, 0);
  document.querySelector("#balance-text").textContent = [
    balance.policy,
    `${balance.attached} experts moved in`,
    `${replicas} function replicas wanted`,
    foretold.length ? `${percent(mean(foretold))} of routes foretold` : "",
  ]
    .filter(Boolean)
    .join(" · ");
  const svg = shape("svg", { viewBox: "0 0 400 100", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute(
    "aria-label",
    `Load variation (CV) by layer: ${mean(balance.layer_cv).toFixed(2)} on average with one replica of each expert, ` +
      `${mean(balance.scaled_cv).toFixed(2)} with the scaler's`,
  );
  const top = Math.max(...balance.layer_cv, ...balance.scaled_cv, 1e-9);
  const width = 400 / balance.layer_cv.length;
  balance.layer_cv.forEach((cv, layer) => {
    const scaled = balance.scaled_cv[layer];
    const share = balance.overlap[layer];
    const group = shape("g", {});
    const title = shape("title", {});
    title.textContent =
      `Layer ${layer}: CV ${cv.toFixed(2)}, scaled ${scaled.toFixed(2)}` +
      (share === null ? "" : `, ${percent(share)} foretold`);
    const bar = (name, value, from, to) => {
      const height = (value / top) * 96;
      return shape("rect", { class: name, x: (layer + from) * width, width: (to - from) * width, y: 100 - height, height });
    };
    group.append(title, bar("remote", cv, 0.1, 0.5), bar("main", scaled, 0.5, 0.9));
    if (share !== null) group.append(shape("path", { class: "resident", d: `M${layer * width} ${100 - share * 96}h${width}` }));
    svg.append(group);
  });
  document.querySelector("#balance-chart").replaceChildren(svg);
}
