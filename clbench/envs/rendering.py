"""Drawing what MuJoCo simulates, without a display: one OpenGL context per process, made when it is first needed.

Fidelity trades looks for time; physics is the same bit for bit, because the simulated model is only read (a copy of it
is drawn):

    full    what MuJoCo draws by default: shadows, reflections, four samples per pixel
    fast    none of these, and dense meshes without a texture (the robot's) thinned out; about a third of the time

MUJOCO_GL chooses how: egl (a GPU, or Mesa on the CPU), osmesa or glfw (needs a display). Unset: the first that is
available.
"""

from __future__ import annotations

import atexit
import copy
import ctypes.util
import importlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from clbench.errors import UserError, nearest

FIDELITIES = ("fast", "full")
DEFAULT_FIDELITY, DEFAULT_SIZE = "fast", 256
MIN_SIZE, MAX_SIZE = 16, 2048

REMEDY = (
    "Install libegl1 (or libosmesa6) and leave MUJOCO_GL unset, or set it to egl or osmesa. "
    "Streams whose names end in _state need no OpenGL"
)
LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
DENSE_FACES = 1000  # meshes with more are thinned out
CELLS = 24  # along the longest side of a thinned-out mesh
MAX_GEOMS = 1000  # as in robosuite


def check_render(render: Mapping[str, Any]) -> tuple[str, int]:
    """Return (fidelity, size in pixels) of {"fidelity": …, "size": …}; UserError for anything else."""
    for key in render:
        if key not in ("fidelity", "size"):
            raise UserError(f"unknown rendering option '{key}'.{nearest(str(key), ('fidelity', 'size'))}")
    fidelity, size = render.get("fidelity", DEFAULT_FIDELITY), render.get("size", DEFAULT_SIZE)
    if fidelity not in FIDELITIES:
        raise UserError(f"render.fidelity is {fidelity!r} but must be one of {', '.join(FIDELITIES)}.")
    if type(size) is not int or not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"render.size must be a whole number of pixels from {MIN_SIZE} to {MAX_SIZE} but is {size!r}.")
    return fidelity, size


def libraries() -> list[str]:
    """Return which of egl and osmesa are installed."""
    return [name for name, library in LIBRARIES.items() if ctypes.util.find_library(library)]


def backend_name() -> str:
    """Return what MuJoCo should draw with: egl, osmesa or glfw. UserError, with the remedy, if none is available."""
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in ("disable", "disabled", "off", "false", "0"):
        raise UserError(f"camera images cannot be drawn: MUJOCO_GL={chosen} switches drawing off. {REMEDY}.")
    if chosen in ("egl", "osmesa", "glfw"):
        return chosen
    if chosen not in ("", "enable", "enabled", "on", "true", "1", "glx"):
        raise UserError(f"camera images cannot be drawn: MUJOCO_GL={chosen} is not egl, osmesa or glfw. {REMEDY}.")
    for name in libraries():
        return name
    if os.environ.get("DISPLAY"):
        return "glfw"
    raise UserError(f"camera images cannot be drawn: neither EGL nor OSMesa is installed. {REMEDY}.")


@cache
def gl_context() -> Any:
    """Return this process's OpenGL context, made current. UserError, with the remedy, where there is none.

    There is one for all: MuJoCo frees things in the current context, so several would damage each other.
    """
    name = backend_name()
    try:
        context = importlib.import_module(f"mujoco.{name}").GLContext(64, 64)
        context.make_current()
        if not _described():
            raise RuntimeError("no OpenGL context was created")
        atexit.register(context.free)  # later, when modules are gone, it would fail noisily
    except Exception as e:  # PyOpenGL and its libraries raise all kinds of errors
        about = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"camera images cannot be drawn with {name}: {about}. {REMEDY}.") from e
    return context


def opengl_version() -> str:
    """Return the name and version of what draws here, e.g. "llvmpipe (LLVM 15.0.6, 256 bits), 4.5 (…) Mesa 22.3.6"."""
    gl_context().make_current()
    return _described()


def _described() -> str:
    gl = importlib.import_module("OpenGL.GL")
    return ", ".join((gl.glGetString(name) or b"").decode() for name in (gl.GL_RENDERER, gl.GL_VERSION)).strip(", ")


class Renderer:
    """Draws a model from its cameras at one size and fidelity. UserError where there is no OpenGL.

    `hidden`: the group of geoms that are not drawn, where a model's collision shapes have a group of their own.
    """

    def __init__(self, model: Any, width: int, height: int, fidelity: str, hidden: int | None = None) -> None:
        self._gl = gl_context()
        self._gl.make_current()
        self._mujoco = mujoco = importlib.import_module("mujoco")
        drawn = copy.copy(model)
        drawn.vis.global_.offwidth, drawn.vis.global_.offheight = width, height
        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        if fidelity == "fast":
            drawn.vis.quality.shadowsize = drawn.vis.quality.offsamples = 0
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._scene.flags[flag] = 0
            for mesh in dense_plain_meshes(drawn):
                thin_out(drawn, mesh)
        self._model = model
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        if hidden is not None:
            self._option.geomgroup[hidden] = 0
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self.width, self.height = width, height

    def draw(self, data: Any, camera: str) -> np.ndarray:
        """Return what `camera` sees, uint8 (height, width, 3), the lowest row first as in OpenGL."""
        mujoco = self._mujoco
        self._gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        image = np.empty((self.height, self.width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, self._viewport, self._context)
        return image

    def close(self) -> None:
        """Free the OpenGL resources. Closing twice is harmless."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None


def dense_plain_meshes(model: Any) -> list[int]:
    """Return the meshes of more than DENSE_FACES faces on which no geom has a texture."""
    materials = zip(model.geom_dataid, model.geom_type, model.geom_matid, strict=True)
    mesh_type = importlib.import_module("mujoco").mjtGeom.mjGEOM_MESH
    textured = {mesh for mesh, kind, m in materials if kind == mesh_type and m >= 0 and (model.mat_texid[m] >= 0).any()}
    return [m for m in range(model.nmesh) if model.mesh_facenum[m] > DENSE_FACES and m not in textured]


def thin_out(model: Any, mesh: int) -> None:
    """Merge the vertices of a mesh that lie in the same cell of a grid, and drop the faces that vanish.

    Changes what is drawn of `model`, in place. Faces keep their normals, so that surfaces stay smooth.
    """
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    faces, normals = model.mesh_face[start:][:count], model.mesh_facenormal[start:][:count]
    low = vertices.min(axis=0)
    cell = max(float((vertices.max(axis=0) - low).max()) / CELLS, 1e-9)
    _, first, cells = np.unique(
        ((vertices - low) / cell).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    merged = first[cells.reshape(-1)][faces]
    a, b, c = merged.T
    kept = np.flatnonzero((a != b) & (b != c) & (c != a))
    _, distinct = np.unique(np.sort(merged[kept], axis=1), axis=0, return_index=True)
    kept = kept[np.sort(distinct)]
    faces[: len(kept)], normals[: len(kept)] = merged[kept], normals[kept]
    model.mesh_facenum[mesh] = len(kept)
