/** One volume, or two side by side with one crosshair, drawn by NiiVue. */

import { byId, setText } from "./dom.js";

const AXES = ["x", "y", "z"];
const panes = { a: null, b: null };
let position = [0.5, 0.5, 0.5];
let sharing = false;

/** Shows a NIfTI file's bytes in pane `a` or `b`. */
export async function show(which, bytes, fileName, title) {
  const figure = byId(`pane-${which}`);
  figure.hidden = false;
  byId("panes").classList.toggle("two", !byId("pane-b").hidden);
  setText(byId("viewer-error"), "");
  try {
    panes[which] ??= await makePane(figure.querySelector("canvas"));
    const viewer = panes[which];
    while (viewer.volumes.length) viewer.removeVolumeByIndex(0);
    await viewer.loadFromArrayBuffer(bytes, fileName);
  } catch (error) {
    setText(byId("viewer-error"), cannot(error));
    return;
  }
  setText(figure.querySelector(".title"), title);
  figure.querySelector("canvas").setAttribute("aria-label", `${title}: generated image, not a patient`);
  byId("viewer-text").hidden = true;
  byId("position").hidden = false;
  setView();
  move(position);
  turn();
}

/** Takes the second volume away. */
export function endComparison() {
  byId("pane-b").hidden = true;
  byId("panes").classList.remove("two");
}

/** Nothing is shown any more. */
export function clear() {
  endComparison();
  for (const viewer of Object.values(panes)) while (viewer?.volumes.length) viewer.removeVolumeByIndex(0);
  byId("pane-a").hidden = true;
  byId("position").hidden = true;
  byId("viewer-text").hidden = false;
  setText(byId("viewer-error"), "");
}

export function setUp() {
  byId("view").addEventListener("change", setView);
  for (const axis of AXES) {
    byId(axis).addEventListener("input", () => move(AXES.map((name) => byId(name).valueAsNumber)));
  }
  byId("turn").addEventListener("input", turn);
  byId("close-b").addEventListener("click", () => {
    endComparison();
    byId("viewer-title").focus();
  });
}

async function makePane(canvas) {
  const { Niivue } = await import("./vendor/niivue.min.js"); // Large: only when there is something to show.
  const viewer = new Niivue({
    logLevel: "error",
    dragAndDropEnabled: false,
    scrollRequiresFocus: true, // The page scrolls past the volume.
    show3Dcrosshair: true,
    crosshairWidth: 1.6,
    crosshairWidthUnit: "mm",
    crosshairColor: [0.3, 0.75, 1, 0.8],
    fontColor: [0.85, 0.85, 0.85, 1],
    multiplanarShowRender: 1, // Always.
    multiplanarPadPixels: 8,
    fontMinPx: 16,
  });
  viewer.onLocationChange = () => !sharing && move([...viewer.scene.crosshairPos]);
  viewer.onAzimuthElevationChange = (azimuth, elevation) => !sharing && share((other) => {
    if (other !== viewer) other.setRenderAzimuthElevation(azimuth, elevation);
  });
  await viewer.attachToCanvas(canvas);
  return viewer;
}

// What is done to one pane is done to both, without the panes answering each other for ever.
function share(act) {
  sharing = true;
  try {
    for (const viewer of Object.values(panes)) if (viewer?.volumes.length) act(viewer);
  } finally {
    sharing = false;
  }
}

/** Puts the crosshair at a place: shares of the volume's extent, 0 to 1, along X, Y, Z. */
function move(place) {
  position = place;
  AXES.forEach((axis, i) => {
    byId(axis).value = place[i];
  });
  share((viewer) => {
    if ([...viewer.scene.crosshairPos].some((value, i) => Math.abs(value - place[i]) > 1e-4)) {
      viewer.scene.crosshairPos = place;
      viewer.drawScene();
    }
  });
}

function turn() {
  const azimuth = byId("turn").valueAsNumber;
  share((viewer) => viewer.setRenderAzimuthElevation(azimuth, viewer.scene.renderElevation));
}

function setView() {
  const name = byId("view").value;
  share((viewer) => {
    const { sliceTypeAxial, sliceTypeCoronal, sliceTypeSagittal, sliceTypeRender, sliceTypeMultiplanar } = viewer;
    const types = { axial: sliceTypeAxial, coronal: sliceTypeCoronal, sagittal: sliceTypeSagittal };
    viewer.setSliceType({ ...types, render: sliceTypeRender, all: sliceTypeMultiplanar }[name]);
  });
}

function cannot(error) {
  const probe = document.createElement("canvas").getContext("webgl2");
  return probe
    ? `The volume cannot be shown: ${error.message}`
    : "This browser cannot show volumes: it has no WebGL 2. The previews and downloads in the list still work.";
}
