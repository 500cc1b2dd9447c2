"""Data sets and models as the hub has them, and a hub on this machine's loopback that serves them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGES = ("observation.images.image", "observation.images.image2")
SIZE = 16


def make_hub_set(
    root: Path,
    texts: Sequence[str],
    episodes: int = 2,
    length: int = 5,
    images: Sequence[str] = IMAGES,
    state: int = 8,
    videos: bool = False,
    file_mb: float = 0.01,
    gripper: tuple[float, float] = (-1.0, 1.0),
    extra: bool = False,
) -> Path:
    """Write a set with LeRobot itself: `texts` in turn, one episode each, `episodes` times; several data files."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    kind = "video" if videos else "image"
    features: dict[str, Any] = {
        k: {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channel"]} for k in images
    }
    features["observation.state"] = {"dtype": "float32", "shape": (state,), "names": ["state"]}
    features["action"] = {"dtype": "float32", "shape": (7,), "names": ["actions"]}
    if extra:
        features["observation.states.joint_state"] = {"dtype": "float32", "shape": (7,), "names": None}
    h264 = RGBEncoderConfig(vcodec="h264")  # the default takes no images as small as these
    dataset = LeRobotDataset.create(
        root.name, fps=10, features=features, root=root, use_videos=videos, robot_type="panda", rgb_encoder=h264
    )
    dataset.meta.info.data_files_size_in_mb = file_mb
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        for t, text in enumerate(texts):
            for i in range(length):
                frame: dict[str, Any] = {k: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for k in images}
                frame["observation.state"] = (t + rng.normal(size=state)).astype(np.float32)
                action = rng.uniform(-0.9, 0.9, 7).astype(np.float32)
                action[6] = gripper[i % 2]
                frame |= {"action": action, "task": text}
                if extra:
                    frame["observation.states.joint_state"] = np.zeros(7, dtype=np.float32)
                dataset.add_frame(frame)
            dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root


@contextmanager
def served(repos: dict[str, Path | int], tags: Sequence[str] = ("v3.0",)) -> Iterator[tuple[str, list[str]]]:
    """A hub with these data sets and models (a number: the status with which the hub refuses it). Yields its address
    and what was asked of it."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(f"{self.command} {path}")
            repo = next((r for r in repos if f"/{r}/" in path), None)
            if repo is None:
                return self.refuse(404, "RepoNotFound")
            root = repos[repo]
            if isinstance(root, int):
                return self.refuse(root, "GatedRepo" if root == 403 else "")
            rest = path.split(f"/{repo}/")[1]
            what, _, rest = rest.partition("/")
            if what == "refs":
                names = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": COMMIT} for t in tags]
                return self.answer({"tags": names, "branches": [], "converts": []})
            revision, _, name = rest.partition("/")
            if revision not in (*tags, COMMIT):
                return self.refuse(404, "RevisionNotFound")
            files = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
            if what == "revision":
                return self.answer({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
            if what == "tree":
                sizes = {f: (p.stat().st_size, etag(p)) for f, p in files.items()}
                return self.answer([{"type": "file", "path": f, "size": n, "oid": e} for f, (n, e) in sizes.items()])
            if what == "resolve" and name in files:
                headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT}
                return self.send(200, files[name].read_bytes(), headers)
            return self.refuse(404, "EntryNotFound")

        def answer(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b"{}", {"X-Error-Code": code})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:40]
