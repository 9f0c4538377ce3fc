// The page of the server: sends a video, shows what came back. No text of a file or of a response becomes HTML.
"use strict";

const PATH = "explanations/etenet"; // beside the page, which may be below a path of another server
const HEADERS = { "X-Etenet-Captions": "5" };
const PICTURES = { "X-Etenet-Thumbnails": "128" };
const SEGMENTS_AT_ONCE = 16;
const SHORTEST_REST_S = 0.5; // as in etenet.video.segments
const SENTENCES = {
  0: "The server cannot be reached, or it closed the connection, as it does if a video is too large.",
  404: "There is no captioner at this address.",
  413: "The video is too large for this server. Send a shorter or smaller one.",
  502: "The captioner is not running at the moment. Try again soon.",
  503: "The server is busy. Try again in a moment.",
  504: "The captioner did not answer in time. Try again.",
};
const PASSING = [0, 408, 502, 503, 504];

const $ = (id) => document.getElementById(id);
let asked = null; // the video that is shown or sent: {file, headers, request, segments}; while it is fetched only {request}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const percent = (share) => `${Math.round(100 * share)} %`;
const seconds = (s) => `${s.toFixed(2)} s`;
const key = () => $("key").value.replace(/[^!-~]/g, ""); // a copied key may have blanks, and marks that nobody sees
const say = (text) => { $("status").textContent = text; };

function clock(s) {
  const tenths = Math.round(10 * s);
  return `${Math.floor(tenths / 600)}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

function forget() {
  $("error").hidden = $("again").hidden = $("unlock").hidden = true;
  $("cancel").hidden = false;
}

function cancel() {
  if ($("cancel").hidden) return;
  asked.request.abort();
  asked = null;
  $("cancel").hidden = true;
  $("result").classList.remove("stale");
  say("Cancelled.");
}

function fail(message, again = null) {
  say("");
  $("cancel").hidden = true;
  $("error").textContent = sentence(message);
  $("error").hidden = false;
  $("again").hidden = !again;
  $("again").onclick = again;
}

function unlock(again) {
  $("error").textContent = $("key").value ? "This is not a key of this server." : "This server needs a key.";
  $("unlock").hidden = false;
  $("unlock").onsubmit = (event) => {
    event.preventDefault();
    again();
  };
  $("key").focus();
  $("key").select();
}

// What is given: a file, or a link on this server.

async function take(data) {
  const [file] = data.files;
  const link = data.getData("text/uri-list").split(/\r?\n/).find((line) => line && !line.startsWith("#"));
  if (data.files.length > 1) fail(`These are ${data.files.length} files; give one video at a time`);
  else if (file) start(file);
  else if (link || data.getData("text/plain").trim()) await follow(link || data.getData("text/plain").trim());
  else fail("This is neither a file nor a link: drop a video file, or a link to one on this server");
}

function nameOf(url) {
  const name = url.pathname.split("/").pop();
  try {
    return decodeURIComponent(name) || "video";
  } catch { // not UTF-8
    return name;
  }
}

async function follow(link) {
  asked?.request?.abort();
  const request = new AbortController();
  asked = { request };
  forget();
  let url;
  try {
    url = new URL(link, location.href);
  } catch {
    return fail(`This is not a link: ${link}`);
  }
  if (url.origin !== location.origin) {
    return fail(`Only links on this server (${location.origin}) can be followed; download the video, and drop the file`);
  }
  const again = () => follow(link);
  say(`Fetching ${url.pathname} …`);
  try {
    const response = await fetch(url, { signal: request.signal });
    if (!response.ok) return fail(`There is nothing at ${url.pathname} (status ${response.status})`);
    start(new File([await response.blob()], nameOf(url)));
  } catch {
    if (!request.signal.aborted) fail(SENTENCES[0], again);
  }
}

function start(file) {
  const cut = $("cut").value;
  const headers = { ...HEADERS };
  if (cut === "scenes") headers["X-Etenet-Segment"] = cut;
  else if (cut) headers["X-Etenet-Segment-S"] = cut;
  if (cut) headers["X-Etenet-Max-Segments"] = String(SEGMENTS_AT_ONCE);
  send({ file, headers, segments: [] }, 0);
}

function send(question, startS) {
  asked?.request?.abort();
  asked = question;
  const again = () => send(question, startS);
  const request = question.request = new XMLHttpRequest();
  const headers = { ...question.headers, ...PICTURES };
  if (startS) headers["X-Etenet-Start-S"] = String(startS);
  forget();
  $("result").classList.add("stale");
  say(`Sending ${question.file.name} …`);
  request.open("PUT", PATH);
  request.setRequestHeader("Content-Type", "application/octet-stream");
  for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
  if (key()) request.setRequestHeader("Authorization", `Bearer ${key()}`);
  request.upload.onprogress = (event) => {
    const sent = event.loaded / event.total;
    say(sent < 1 ? `Sending ${question.file.name}, ${percent(sent)} …` : `Looking at ${question.file.name} …`);
  };
  request.onload = () => answered(question, startS, request, again);
  request.onerror = () => question.file.slice(0, 1).arrayBuffer().then(
    () => fail(SENTENCES[0], again),
    () => fail(`The browser cannot read ${question.file.name}: it is a folder, or was moved or changed; choose the video again`),
  );
  request.send(question.file);
}

function answered(question, startS, request, again) {
  let response;
  try {
    response = JSON.parse(request.responseText);
  } catch {
    response = {};
  }
  if (!response.video) { // an error, or what a login or another server in between says
    const message = response.error?.message ?? SENTENCES[request.status] ?? `This is not the answer of a captioner (status ${request.status})`;
    fail(message, PASSING.includes(request.status) ? again : null);
    if (request.status === 401) unlock(again);
    return;
  }
  $("cancel").hidden = true;
  const whole = { ...response, start_s: 0, end_s: response.video.duration_s };
  const first = question.segments.length;
  question.segments.push(...(response.segments ?? [whole]));
  question.into_segments = "segments" in response;
  question.video = response.video;
  show(question, response);
  choose(question, first);
  say(`Captioned in ${(response.timing_ms.total / 1000).toFixed(2)} s.`);
  $("status").append(element("span", { className: "unseen", textContent: ` ${question.segments[first].captions[0].caption}` }));
}

// What is shown.

function show(question, response) {
  $("result").hidden = false;
  $("result").classList.remove("stale");
  $("curl").textContent = curl(question);
  facts(question, response);
  timeline(question);
  play(question);
}

function curl(question) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const headers = Object.entries(question.headers).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  if (key()) headers.push('-H "Authorization: Bearer $KEY"');
  // -g: brackets and braces in a name are only letters.
  return ["curl -gT", quoted(question.file.name), ...headers, quoted(new URL(PATH, location.href).href)].join(" ");
}

function facts(question, { video, model, timing_ms: timing }) {
  const rows = {
    video: `${question.file.name}, ${video.width} × ${video.height}, ${video.codec}, ${seconds(video.duration_s)}`,
    model: `${model.name} ${model.version}, ${model.encoder}, ${model.checkpoint.slice(0, 19)}`,
    time: `decoding ${timing.decode} ms, network ${(timing.encode + timing.search).toFixed(1)} ms`,
  };
  $("facts").replaceChildren(
    ...Object.entries(rows).flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]),
  );
}

function timeline(question) {
  const { segments, video } = question;
  $("segments").hidden = !question.into_segments;
  $("bar").replaceChildren(...segments.map((segment, number) => {
    const part = element("i", { title: segment.caption, onclick: () => choose(question, number, true) });
    part.style.flexGrow = segment.end_s - segment.start_s;
    return part;
  }));
  $("transcript").replaceChildren(...segments.map((segment, number) => element("li", {}, element(
    "button",
    { type: "button", onclick: () => choose(question, number, true) },
    element("time", { textContent: `${clock(segment.start_s)} to ${clock(segment.end_s)}` }),
    element("span", { textContent: segment.caption }),
  ))));
  const { end_s: end } = segments.at(-1);
  $("more").hidden = !(question.into_segments && end < video.duration_s - SHORTEST_REST_S);
  $("more").textContent = `Caption the rest, from ${clock(end)}`;
  $("more").onclick = () => send(question, end);
}

function play(question) {
  const video = $("video");
  if (question.url) {
    video.querySelector("track")?.remove();
  } else {
    URL.revokeObjectURL(video.src);
    question.url = URL.createObjectURL(question.file);
    $("player").hidden = false;
    $("unplayable").hidden = true;
    video.replaceChildren();
    video.src = question.url;
  }
  const subtitles = new Blob([vtt(question)], { type: "text/vtt" });
  const track = element("track", { kind: "captions", label: "EtENet", srclang: "en", default: true, src: URL.createObjectURL(subtitles) });
  video.append(track);
  track.track.mode = "showing";
}

function vtt({ segments, video }) {
  const time = (s) => new Date(1000 * (s + video.start_s)).toISOString().slice(11, 23);
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const cues = segments.map((each) => `${time(each.start_s)} --> ${time(each.end_s)}\n${escaped(each.caption)}\n`);
  return ["WEBVTT\n", ...cues].join("\n");
}

function choose(question, number, seek = false) {
  const segment = question.segments[number];
  for (const list of [$("bar"), $("transcript")]) {
    [...list.children].forEach((item, at) => {
      item.classList.toggle("chosen", at === number);
      item.querySelector("button")?.setAttribute("aria-current", at === number);
    });
  }
  if (seek && !$("player").hidden) $("video").currentTime = segment.start_s + question.video.start_s;
  $("frames").replaceChildren(...segment.frames.times_s.map((time, at) => frame(time, segment.frames.thumbnails[at])));
  $("sentences").replaceChildren(...segment.captions.map((each, at) => element("li", {}, element(
    "button",
    { type: "button", onclick: () => spell(segment, at) },
    element("span", { textContent: each.caption }),
    element("small", { textContent: each.confidence === undefined ? `log ${each.log_prob.toFixed(1)}` : percent(each.confidence) }),
  ))));
  spell(segment, 0);
}

function frame(time, url) {
  return element("li", {}, element(
    "figure",
    {},
    element("img", { src: url, alt: `The frame at ${seconds(time)}` }),
    element("div", { className: "weight" }, element("i")),
    element("figcaption", {}, element("span", { textContent: seconds(time) }), element("span", { className: "share" })),
  ));
}

function spell(segment, number) {
  const chosen = segment.captions[number];
  [...$("sentences").querySelectorAll("button")].forEach((button, at) => button.setAttribute("aria-current", at === number));
  $("sentence").replaceChildren(...chosen.words.flatMap(({ word, prob }, at) => {
    const weights = chosen.attention[at];
    const button = element("button", { type: "button", className: "word", textContent: word });
    button.setAttribute("aria-description", describe(prob, weights, segment.frames.times_s));
    button.onpointerenter = button.onfocus = () => light(button, weights);
    button.onpointerleave = button.onblur = () => light(null, null);
    return at ? [" ", button] : [button];
  }));
  light(null, null);
  $("confidence").replaceChildren();
  if (chosen.confidence !== undefined) {
    const gauge = element("span", { className: "gauge" }, element("i"));
    gauge.setAttribute("aria-hidden", "true");
    gauge.style.setProperty("--share", chosen.confidence);
    const text = `${percent(chosen.confidence)} confident: of such captions, about ${Math.round(10 * chosen.confidence)} in 10 are good ones`;
    $("confidence").append(gauge, text);
  }
}

function describe(prob, weights, times) {
  const [first, second] = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
  return `probability ${percent(prob)}; mostly from the frames at ${seconds(times[first])} and ${seconds(times[second])}`;
}

function light(button, weights) {
  for (const word of $("sentence").querySelectorAll(".word")) word.classList.toggle("lit", word === button);
  $("frames").classList.toggle("lit", weights !== null);
  const [least, most] = weights ? [Math.min(...weights), Math.max(...weights)] : [0, 1];
  [...$("frames").children].forEach((item, at) => {
    const weight = weights ? weights[at] : 0;
    item.style.setProperty("--weight", weight / most);
    item.style.setProperty("--light", most > least ? (weight - least) / (most - least) : 1);
    item.querySelector(".share").textContent = weights ? `${(100 * weight).toFixed(1)} %` : "";
  });
}

// What a person does.

$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // so that the same file may be chosen again
  if (file) start(file);
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("link").value.trim()) follow($("link").value.trim());
  else $("link").focus();
});
$("cut").addEventListener("change", () => { if (asked?.file) start(asked.file); });
$("cancel").addEventListener("click", cancel);
addEventListener("keydown", (event) => { if (event.key === "Escape") cancel(); });
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    say("Copied.");
  } catch { // browsers allow it to pages of this machine and of HTTPS only
    getSelection().selectAllChildren($("curl"));
    say("Selected: copy it with the keyboard.");
  }
});
$("video").addEventListener("error", () => {
  $("player").hidden = true;
  $("unplayable").hidden = false;
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer);
});
addEventListener("paste", (event) => {
  if (!["link", "key"].includes(event.target.id)) take(event.clipboardData);
});
