"use strict";
// The review page. Foreign text is only ever set through textContent; nothing is built from markup.

const ASPECTS = {
  visual: ["Visual clues", "What is said of face and scene is true"],
  audio: ["Audio clues", "What is said of the voice is true"],
  text: ["Text clues", "The subtitle is what is spoken"],
  reasoning: ["Reasoning", "The description follows from the clues"],
  label: ["Inferred label", "The label fits the clip"],
};
const CLUES = {
  visual_expression: "Facial expression",
  audio_tone: "Tone of voice",
  visual_objective: "Scene at the peak frame",
};
const $ = (id) => document.getElementById(id);

let session = null;
let item = null;
let strip = null;
let remark = "";
let said = { aspects: {}, score: null };
let marked = 0;
let busy = false;
let place = null; // number of the item that is shown or on its way; null behind the last
let asked = 0;

// ---- talking to the server ------------------------------------------------------------------

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw new Error(
      "The server does not answer. Start the same command again and open the URL that it prints; what was saved stays.",
    );
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error || `The server answers ${answer.status}.`);
  return told;
}

function complain(error) {
  $("notice").textContent = error.message;
  $("notice").hidden = false;
}

// ---- small things ---------------------------------------------------------------------------

function make(tag, { text, ...rest } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), rest);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

const seconds = (value) => `${value.toFixed(2)} s`;
const draftKey = () => `draft ${session.rater} ${item.uid} ${item.digest}`;

function keepDraft() {
  sessionStorage.setItem(draftKey(), JSON.stringify({ ...said, comment: $("comment").value }));
}

function draft() {
  const kept = sessionStorage.getItem(draftKey());
  return kept === null ? null : JSON.parse(kept);
}

function typing() {
  return document.activeElement instanceof HTMLTextAreaElement;
}

// ---- the clip -------------------------------------------------------------------------------

function player() {
  return [$("video"), $("audio")].find((element) => !element.hidden) ?? null;
}

function endMedia() {
  for (const element of [$("video"), $("audio")]) {
    element.pause();
    element.removeAttribute("src");
    element.load();
    element.hidden = true;
  }
  for (const name of ["still", "nothing", "track", "peak"]) $(name).hidden = true;
  $("strip").replaceChildren();
  $("about-media").textContent = "";
}

function showMedia() {
  endMedia();
  if (item.problem) {
    $("nothing").textContent = item.problem;
    $("nothing").hidden = false;
    return;
  }
  const base = `items/${item.number}`;
  if (item.kind === "video") {
    $("video").hidden = false;
    $("video").src = `${base}/media`;
  } else if (item.kind === "audio") {
    $("audio").hidden = false;
    $("audio").src = `${base}/media`;
  }
  if (item.kind !== "audio") loadStrip(item);
}

async function loadStrip(of) {
  let found;
  try {
    found = await ask(`items/${of.number}/strip`);
  } catch (error) {
    if (of === item) $("about-media").textContent = error.message;
    return;
  }
  if (of !== item) return;
  strip = found;
  const base = `items/${of.number}/frames`;
  $("strip").replaceChildren(
    ...found.frames.map((frame) => {
      const title = `Frame ${frame.index}${frame.is_peak ? ", the peak" : ""}`;
      const button = make(
        "button",
        { type: "button", title, className: frame.is_peak ? "peak" : "" },
        make("img", { src: `${base}/${frame.index}.jpg`, alt: title }),
        make("small", { text: `${frame.is_peak ? "◆ " : ""}${frame.pts_s.toFixed(1)} s` }),
      );
      button.addEventListener("click", () => go(frame));
      return button;
    }),
  );
  tellMedia();
  if ($("video").hidden) showFrame(found.frames.find((frame) => frame.is_peak) ?? found.frames[0]);
  tick();
}

function tellMedia() {
  const told = [];
  if (item.peak) {
    const time = peakTime();
    told.push(`◆ Peak: frame ${item.peak.index}${time === null ? "" : ` at ${seconds(time)}`}`);
  }
  if (remark) told.push(remark);
  if (strip) told.push(...strip.problems);
  $("about-media").textContent = told.join(" · ");
}

function peakTime() {
  const frame = strip?.frames.find((found) => found.is_peak);
  return frame?.pts_s ?? item.peak?.pts_s ?? null;
}

// A browser that cannot play the file gets frames and a sound that the server decoded.
async function fallBack() {
  if (item.kind === "audio") {
    if ($("audio").src.endsWith("/media")) $("audio").src = `items/${item.number}/sound.wav`;
    return;
  }
  if ($("video").hidden) return;
  const of = item;
  $("video").hidden = true;
  if (strip === null) await loadStrip(of);
  if (of !== item) return;
  const first = strip?.frames.find((frame) => frame.is_peak) ?? strip?.frames[0];
  if (first) showFrame(first);
  if (strip?.sound) {
    $("audio").hidden = false;
    $("audio").src = `items/${of.number}/sound.wav`;
  }
  if (!first && !strip?.sound) {
    $("nothing").textContent = "This clip cannot be decoded.";
    $("nothing").hidden = false;
  }
  remark = "this browser cannot play the file: frames and sound were decoded by the server";
  tellMedia();
}

function showFrame(frame) {
  if (!frame) return;
  const source = `items/${item.number}/frames/${frame.index}.jpg`;
  if (!$("still").src.endsWith(source)) $("still").src = source;
  $("still").hidden = false;
  pressFrame(frame);
}

function pressFrame(frame) {
  [...$("strip").children].forEach((button, at) => {
    button.setAttribute("aria-pressed", String(strip.frames[at] === frame));
  });
}

function go(frame) {
  const playing = player();
  if (playing !== null) playing.currentTime = frame.pts_s;
  if ($("video").hidden) showFrame(frame);
  tick();
}

function goToPeak() {
  const frame = strip?.frames.find((found) => found.is_peak);
  const time = peakTime();
  if (frame) go(frame);
  else if (time !== null && player() !== null) player().currentTime = time;
}

function duration() {
  const known = player()?.duration;
  if (Number.isFinite(known) && known > 0) return known;
  return strip?.frames.at(-1)?.pts_s || null;
}

function tick() {
  const playing = player();
  const whole = duration();
  $("track").hidden = playing === null || whole === null || item.kind === "audio";
  if (playing === null || whole === null) return;
  const time = playing.currentTime;
  $("now").style.width = `${Math.min(100, (100 * time) / whole)}%`;
  const peak = peakTime();
  $("peak").hidden = peak === null;
  if (peak !== null) $("peak").style.left = `${Math.min(100, (100 * peak) / whole)}%`;
  if (strip?.frames.length) {
    const before = strip.frames.filter((frame) => frame.pts_s <= time + 0.02).at(-1) ?? strip.frames[0];
    if ($("video").hidden) {
      if (!playing.paused) showFrame(before);
    } else pressFrame(before);
  }
}

// ---- texts ----------------------------------------------------------------------------------

function clue(title, text, from, name = "") {
  const card = make("section", { className: `clue ${name} ${text ? "" : "none"}` });
  card.append(make("h2", { text: title }), make("p", { text: text || "none" }));
  if (from) card.append(make("span", { className: "from", text: from }));
  return card;
}

function showTexts() {
  const cards = [];
  for (const [language, origin, text] of item.subtitles)
    cards.push(clue("Subtitle", text, [language, origin].filter(Boolean).join(", ")));
  if (!item.subtitles.length) cards.push(clue("Subtitle", ""));
  cards.push(clue("Label", item.label, item.target ? item.target.replaceAll("_", " ") : "", "label"));
  for (const [kind, title] of Object.entries(CLUES)) {
    const found = item.clues.filter(([of]) => of === kind);
    for (const [, text] of found) cards.push(clue(title, text));
    if (!found.length) cards.push(clue(title, ""));
  }
  $("clues").replaceChildren(...cards);
  $("text").textContent = item.description;
  $("target").textContent = item.writer ? `by ${item.writer}` : "";
  $("uid").textContent = item.uid;
}

// ---- verdicts -------------------------------------------------------------------------------

function showForm() {
  $("aspects").replaceChildren(
    ...Object.entries(ASPECTS).map(([aspect, [title, about]]) => {
      const there = item.aspects.includes(aspect);
      const row = make("div", { className: `aspect ${there ? "" : "off"}` });
      row.dataset.aspect = aspect;
      row.append(make("span", { text: title }, make("small", { text: there ? about : "nothing to judge" })));
      if (!there) return row;
      for (const [verdict, word] of [["accept", "Accept"], ["reject", "Reject"]]) {
        const button = make("button", { type: "button", className: verdict, text: word });
        button.setAttribute("aria-label", `${title}: ${word}`);
        button.addEventListener("click", () => decide(aspect, verdict));
        row.append(button);
      }
      return row;
    }),
  );
  $("score").hidden = session.scale !== "graded";
  $("digits").hidden = $("digits").nextElementSibling.hidden = session.scale !== "graded";
  $("best").textContent = `${session.max_score} fully right`;
  $("scores").replaceChildren(
    ...Array.from({ length: session.max_score + 1 }, (_, score) => {
      const button = make("button", { type: "button", text: String(score) });
      button.setAttribute("aria-label", `Score ${score}`);
      button.addEventListener("click", () => grade(score));
      return button;
    }),
  );
}

function paint() {
  for (const row of $("aspects").children) {
    const aspect = row.dataset.aspect;
    row.classList.toggle("marked", item.aspects[marked] === aspect);
    for (const button of row.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.classList.contains(said.aspects[aspect] ?? "none")));
  }
  [...$("scores").children].forEach((button, score) => {
    button.setAttribute("aria-pressed", String(said.score === score));
  });
}

function decide(aspect, verdict) {
  said.aspects[aspect] = verdict;
  marked = Math.min(item.aspects.indexOf(aspect) + 1, item.aspects.length - 1);
  changed();
}

function grade(score) {
  said.score = score;
  changed();
}

function acceptRest() {
  for (const aspect of item.aspects) said.aspects[aspect] ??= "accept";
  changed();
}

function changed() {
  paint();
  keepDraft();
  status("");
}

function status(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function missing() {
  const names = item.aspects.filter((aspect) => !(aspect in said.aspects)).map((aspect) => ASPECTS[aspect][0]);
  if (session.scale === "graded" && said.score === null) names.push("the score");
  return names;
}

async function save() {
  if (busy || item === null || item.number !== place) return;
  const lacking = missing();
  if (lacking.length) {
    status(`Still to judge: ${lacking.join(", ")}`, true);
    marked = Math.max(0, item.aspects.findIndex((aspect) => !(aspect in said.aspects)));
    paint();
    return;
  }
  busy = true;
  $("save").disabled = true;
  const of = item;
  try {
    await ask("ratings", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        number: of.number,
        digest: of.digest,
        aspects: said.aspects,
        score: session.scale === "graded" ? said.score : null,
        comment: $("comment").value,
      }),
    });
    sessionStorage.removeItem(draftKey());
    session.rated[of.number] = true;
    $("notice").hidden = true;
    status("Saved");
    show(nextOpen(of.number)).catch(complain);
  } catch (error) {
    status(`Not saved: ${error.message}`, true);
  } finally {
    busy = false;
    $("save").disabled = false;
  }
}

// ---- going about ----------------------------------------------------------------------------

function nextOpen(after) {
  const n = session.rated.length;
  for (let step = 1; step <= n; step += 1) {
    const number = (after + step) % n;
    if (!session.rated[number]) return number;
  }
  return null;
}

function showProgress() {
  const n = session.rated.length;
  const done = session.rated.filter(Boolean).length;
  $("bar").max = n;
  $("bar").value = done;
  $("count").textContent = `${done} of ${n} rated`;
  $("place").textContent = item === null ? "" : `Item ${item.number + 1}${session.rated[item.number] ? " ✓" : ""}`;
  $("back").disabled = item !== null && item.number === 0;
  $("on").disabled = item === null || item.number === n - 1;
}

async function show(number) {
  const turn = (asked += 1);
  place = number;
  if (number === null) {
    endMedia();
    item = null;
    $("work").hidden = true;
    $("done").hidden = false;
    history.replaceState(null, "", "#done");
    showProgress();
    return;
  }
  $("right").inert = true; // nothing is said of what is not shown yet
  let found;
  try {
    found = await ask(`items/${number}`);
  } catch (error) {
    if (turn === asked) place = item?.number ?? null;
    throw error;
  } finally {
    if (turn === asked) $("right").inert = false;
  }
  if (turn !== asked) return; // somebody went on meanwhile
  item = found;
  strip = null;
  remark = "";
  const kept = draft() ?? found.rating ?? {};
  said = { aspects: { ...kept.aspects }, score: kept.score ?? null };
  $("comment").value = kept.comment ?? "";
  marked = Math.max(0, item.aspects.findIndex((aspect) => !(aspect in said.aspects)));
  $("work").hidden = false;
  $("done").hidden = true;
  history.replaceState(null, "", `#${number + 1}`);
  document.activeElement?.blur();
  window.scrollTo(0, 0);
  $("right").scrollTop = $("text").scrollTop = 0;
  showTexts();
  showForm();
  paint();
  status("");
  showProgress();
  showMedia();
}

function move(step) {
  const to = (place ?? session.rated.length) + step;
  if (to >= 0 && to < session.rated.length) show(to).catch(complain);
}

function playOrPause() {
  const playing = player();
  if (playing === null) return;
  if (playing.paused) playing.play().catch(() => {});
  else playing.pause();
}

function press(event) {
  if (session === null) return;
  if (typing()) {
    if (event.key === "Escape") document.activeElement.blur();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight" && place !== null) move(1);
  else if (item === null || item.number !== place) return;
  else if (event.key === "ArrowUp") { marked = Math.max(0, marked - 1); paint(); }
  else if (event.key === "ArrowDown") { marked = Math.min(item.aspects.length - 1, marked + 1); paint(); }
  else if (event.key === "a") decide(item.aspects[marked], "accept");
  else if (event.key === "r") decide(item.aspects[marked], "reject");
  else if (event.key === "A") acceptRest();
  else if (event.key === "Enter") { if (event.repeat) return; save(); }
  else if (event.key === " ") playOrPause();
  else if (event.key === "p") goToPeak();
  else if (event.key === "c") $("comment").focus();
  else if (session.scale === "graded" && /^[0-9]$/.test(event.key) && Number(event.key) <= session.max_score) grade(Number(event.key));
  else return;
  event.preventDefault();
}

async function start() {
  session = await ask("session");
  $("who").textContent = `by ${session.rater}`;
  $("file").textContent = session.ratings;
  const named = Number.parseInt(location.hash.slice(1), 10) - 1;
  const known = Number.isInteger(named) && named >= 0 && named < session.rated.length;
  await show(known ? named : nextOpen(session.rated.length - 1));
}

document.addEventListener("keydown", press, true);
$("form").addEventListener("submit", (event) => { event.preventDefault(); save(); });
$("all").addEventListener("click", acceptRest);
$("back").addEventListener("click", () => move(-1));
$("on").addEventListener("click", () => move(1));
$("comment").addEventListener("input", () => { if (item !== null) keepDraft(); });
$("peak").addEventListener("click", (event) => { event.stopPropagation(); goToPeak(); });
$("track").addEventListener("click", (event) => {
  const playing = player();
  const box = $("track").getBoundingClientRect();
  if (playing !== null && duration() !== null) playing.currentTime = ((event.clientX - box.left) / box.width) * duration();
});
for (const element of [$("video"), $("audio")]) {
  element.addEventListener("error", () => { if (!element.hidden && element.hasAttribute("src")) fallBack(); });
  for (const name of ["timeupdate", "seeked", "loadedmetadata", "durationchange"]) element.addEventListener(name, () => { if (item !== null) tick(); });
}
// A video of which only the sound can be played, as with old MPEG-4 in an .mp4.
$("video").addEventListener("loadeddata", () => { if ($("video").videoWidth === 0) fallBack(); });
start().catch(complain);
