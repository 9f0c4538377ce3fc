// Filters and sorts the clips of a report.
"use strict";

const $ = (id) => document.getElementById(id);
const clips = [...$("clips").children].map((item) => ({
  item,
  text: [...item.querySelectorAll(".name, .caption, .error")].map((part) => part.textContent).join(" ").toLowerCase(),
  kind: item.dataset.kind,
  confidence: item.dataset.confidence === "" ? null : Number(item.dataset.confidence),
}));

function filter() {
  const words = $("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = $("kind").value;
  const most = Number($("most").value) / 100;
  let shown = 0;
  for (const { item, text, kind: its, confidence } of clips) {
    const fits = words.every((word) => text.includes(word)) && (!kind || its === kind)
      && (most === 1 || (confidence !== null && confidence <= most));
    item.hidden = !fits;
    shown += fits;
  }
  $("limit").value = `${$("most").value} %`;
  const failed = clips.filter((clip) => clip.kind === "failed").length;
  $("count").textContent = `${shown.toLocaleString("en")} of ${clips.length.toLocaleString("en")} clips; ${failed.toLocaleString("en")} failed`;
}

function sort() {
  const direction = Number($("order").value);
  const key = ({ confidence }) => confidence ?? Infinity * direction; // those without one come last
  const sorted = direction ? [...clips].sort((a, b) => direction * (key(a) - key(b)) || 0) : clips;
  $("clips").append(...sorted.map(({ item }) => item));
}

$("filter").addEventListener("submit", (event) => event.preventDefault());
$("filter").addEventListener("input", filter);
$("order").addEventListener("change", sort);
$("filter").hidden = false;
filter();
