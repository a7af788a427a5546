function put(input, files) {
  const carried = new DataTransfer();
  files.forEach((file) => carried.items.add(file));
  input.files = carried.files;
}
// What Gradio's picture does not do by itself: a picture dropped onto another one, or pasted anywhere, takes its place.
function give(files) {
  const box = document.querySelector("#picture");
  if (!box || !box.offsetParent || !files.length) return false;
  if (box.querySelector("img")) box.querySelector("button").click(); // the cross
  const again = setInterval(() => {
    const input = box.querySelector("input[type=file]");
    if (!input) return;
    clearInterval(again);
    put(input, files.slice(0, 1));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, 50);
  return true;
}
document.addEventListener("drop", (event) => {
  if (!event.target.closest("#picture")) return;
  if (give([...event.dataTransfer.files])) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}, true);
document.addEventListener("paste", (event) => {
  if (give([...event.clipboardData.files])) event.preventDefault();
});
// What was chosen last, which the server's answer to an earlier choice may set back before Gradio has read it.
let chosen = "";
document.addEventListener("input", (event) => {
  if (event.target.type == "radio") chosen = event.target.value;
}, true);
// Arrow keys, as usual among choices and tabs.
document.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  const group = event.target.closest("fieldset, [role=tablist]");
  const all = [...(group?.querySelectorAll("input[type=radio], [role=tab]") ?? [])];
  if (!step || !all.includes(event.target)) return;
  const next = all[(all.indexOf(event.target) + step + all.length) % all.length];
  next.focus();
  if (next.checked) next.dispatchEvent(new Event("input", { bubbles: true })); // by such an answer
  else next.click();
  event.preventDefault();
});
// Gradio refuses a whole folder for a hidden file in it, such as .DS_Store.
document.addEventListener("change", (event) => {
  const input = event.target;
  const files = [...(input.files ?? [])];
  const shown = files.filter((file) => !file.name.startsWith("."));
  if (input.webkitdirectory && shown.length < files.length) put(input, shown);
}, true);
// The prompts of many pictures as they stand in the list; whoever leaves with edits is asked first.
let edited = false;
function collect() {
  edited = false;
  return [...document.querySelectorAll("#table .line")].map((line) => (
    { image: line.dataset.image, prompt: line.querySelector("textarea")?.value ?? "" }));
}
document.addEventListener("input", (event) => {
  if (event.target.closest("#table")) edited = true;
});
document.addEventListener("click", (event) => {
  const line = event.target.closest("#table button")?.closest(".line");
  if (line) line.querySelector("textarea").value = line.dataset.first;
});
window.addEventListener("beforeunload", (event) => {
  if (edited) event.preventDefault();
});
// Gradio changes the text inside an area that is there already; an area that somebody edited would not show it.
new MutationObserver((changes) => {
  for (const { target } of changes) {
    const area = (target.nodeType == Node.TEXT_NODE ? target.parentElement : target)?.closest?.("#table textarea");
    if (area) area.value = area.defaultValue;
  }
}).observe(document, { childList: true, characterData: true, subtree: true });
