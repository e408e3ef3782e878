// The box that takes a clip: by drop, choice, recording or example. The file goes to the page's own server
// as plain bytes, without its name; what comes back is a random id, and that is the value of the box.
const at = (name) => element.querySelector(`.ec-${name}`);
const box = at("clip");
const maxBytes = props.max_bytes, maxSeconds = props.max_duration_s;
const size = (n) => n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} KB` : `${Number((n / 1e6).toPrecision(3))} MB`;
const where = (path) => new URL(path, document.baseURI);
let sending = null, recorder = null, clock = null, shown = null;

at("limits").textContent = `Video, sound or picture, at most ${size(maxBytes)} and ${maxSeconds} s`;

function say(problem) {
  at("problem").textContent = problem;
  at("problem").hidden = !problem;
}

function state(name) {
  box.dataset.state = name;
  const busy = name === "sending" || name === "recording";
  at("drop").hidden = name !== "empty";
  at("progress").hidden = name !== "sending";
  at("stop").hidden = name !== "recording";
  at("remove").hidden = name === "empty" || name === "recording";
  at("examples").hidden = name !== "empty" || !props.examples.length;
  at("bar").hidden = name === "empty";
  at("remove").textContent = busy ? "Cancel" : "Remove";
}

function forget(id) {
  if (id) navigator.sendBeacon(where(`clips/${encodeURIComponent(id)}/forget`));
}

function show(file) {
  if (shown) URL.revokeObjectURL(shown);
  shown = null;
  at("unplayable").hidden = true;
  for (const name of ["video", "audio", "still"]) {
    const player = at(name);
    player.hidden = true;
    player.srcObject = null;
    player.onerror = null;
    player.removeAttribute("src");
    if (player.load) player.load();
  }
  if (!file) return;
  const kind = (file.type || "").split("/")[0];
  const player = at(kind === "audio" ? "audio" : kind === "image" ? "still" : "video");
  shown = URL.createObjectURL(file);
  player.onerror = () => {
    player.hidden = true;
    at("unplayable").hidden = false;
  };
  player.src = shown;
  player.hidden = false;
}

function clear() {
  if (sending) sending.abort();
  sending = null;
  const id = props.value;
  props.value = "";
  forget(id);
  show(null);
  at("file").value = "";
  at("about").textContent = "";
  say("");
  state("empty");
}

function take(file, name) {
  if (box.dataset.state !== "empty") clear();
  say("");
  if (!file.size) return say("The file is empty (0 bytes). Choose one that holds a clip.");
  if (file.size > maxBytes) {
    return say(`The clip is larger than ${size(maxBytes)}, the most that this page takes. `
      + "Cut it, or save it with a smaller picture.");
  }
  show(file);
  at("about").textContent = `${name} · ${size(file.size)}`;
  at("progress").value = 0;
  state("sending");
  const request = sending = new XMLHttpRequest();
  request.open("POST", where("clips"));
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.upload.onprogress = (event) => { at("progress").value = event.loaded / event.total; };
  const fail = (problem) => {
    if (request !== sending) return;
    sending = null;
    clear();
    say(problem);
  };
  request.onerror = () => fail("The clip could not be sent: the page's server does not answer. Is it still running?");
  request.onload = () => {
    let told = {};
    try { told = JSON.parse(request.responseText); } catch { /* not from our server: said below */ }
    if (request.status !== 200 || !told.id) {
      return fail(told.error || `The clip was not taken (status ${request.status}).`);
    }
    if (request !== sending) return forget(told.id);
    sending = null;
    state("ready");
    props.value = told.id;
  };
  request.send(file);
}

async function record() {
  say("");
  if (!navigator.mediaDevices || !window.MediaRecorder) {
    return say("This browser gives camera and microphone only to pages of this machine (localhost) or by https. "
      + "Choose a file in place of it.");
  }
  let stream = null, why = null;
  for (const wanted of [{ video: true, audio: true }, { audio: true }, { video: true }]) {
    try { stream = await navigator.mediaDevices.getUserMedia(wanted); break; } catch (error) { why = error; }
  }
  if (!stream) {
    const denied = why && why.name === "NotAllowedError";
    return say(denied ? "Recording was not allowed. Allow camera and microphone in the browser, or choose a file."
      : "There is no camera and no microphone here. Choose a file.");
  }
  const blocks = [];
  let n = 0;
  recorder = new MediaRecorder(stream, { videoBitsPerSecond: 2_500_000 });
  recorder.ondataavailable = (event) => {
    blocks.push(event.data);
    n += event.data.size;
    if (n > maxBytes * 0.98 && recorder) recorder.stop();
  };
  recorder.onstop = () => {
    clearInterval(clock);
    for (const track of stream.getTracks()) track.stop();
    const kind = recorder.mimeType || "video/webm";
    recorder = null;
    at("video").muted = false;
    state("empty");
    take(new Blob(blocks, { type: stream.getVideoTracks().length ? kind.replace("audio/", "video/") : kind }), "Your recording");
  };
  show(null);
  at("video").srcObject = stream;
  at("video").muted = true;
  at("video").hidden = !stream.getVideoTracks().length;
  at("video").play();
  state("recording");
  const since = performance.now();
  const tick = () => {
    const seconds = (performance.now() - since) / 1000;
    at("about").textContent = `Recording ${seconds.toFixed(0)} of ${maxSeconds} s`;
    // A recording is a little longer than the clock says.
    if (seconds >= Math.max(1, maxSeconds - 1) && recorder) recorder.stop();
  };
  tick();
  clock = setInterval(tick, 250);
  recorder.start(500);
}

at("file").addEventListener("change", () => {
  const file = at("file").files[0];
  if (file) take(file, file.name);
});
at("record").addEventListener("click", record);
at("stop").addEventListener("click", () => recorder && recorder.stop());
at("remove").addEventListener("click", clear);
for (const [what, change] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  box.addEventListener(what, (event) => {
    event.preventDefault();
    box.classList.toggle("is-over", change);
    if (what === "drop" && event.dataTransfer.files.length) {
      take(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
    }
  });
}
props.examples.forEach((name, number) => {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "ec-button";
  button.textContent = name;
  button.addEventListener("click", async () => {
    try {
      const answer = await fetch(where(`examples/${number}`));
      if (!answer.ok) throw new Error(String(answer.status));
      take(await answer.blob(), name);
    } catch { say("The example could not be read from the page's server. Is it still running?"); }
  });
  at("examples").append(button);
});
window.addEventListener("pagehide", () => forget(props.value));
state("empty");
