"""Frames a second that the video pipeline decodes and delivers.

    python benchmarks/video_pipeline.py                    # a clip made here
    python benchmarks/video_pipeline.py my_videos/*.mp4

Three figures for each number of files read at once: stored frames decoded and resized,
without tf.data; and frames delivered by `training_clips` (64-frame clips at 12 frames a
second from a random place, cropped and batched) and by `evaluation_segments`. With the
processor time used, in cores: near the number of cores means that they are kept busy.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from tokenlearner_keras.data import (
    VideoRecord,
    evaluation_segments,
    read_video,
    training_clips,
)


def make_video(path, seconds=30, height=480, width=640, fps=30):
    """A video of Charades' length and size: moving patterns and noise, H.264."""
    import av

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (height, width, 3), dtype="uint8")
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for index in range(seconds * fps):
            wave = 100 + 90 * np.sin((x + 3 * index) / 40) * np.cos((y - index) / 30)
            picture = wave[..., None].astype("uint8") + np.roll(noise, index, axis=1)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure(function, seconds):
    """Frames a second and cores in use while `function` yields counts of frames."""
    frames, start, cpu = 0, None, None
    for count in function():
        if start is None:  # the first item fills the pipeline
            start, cpu = time.perf_counter(), _cpu()
            continue
        frames += count
        if time.perf_counter() - start > seconds:
            break
    wall = time.perf_counter() - start
    return frames / wall, (_cpu() - cpu) / wall


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def decode_only(paths, parallel):
    def run():
        with ThreadPoolExecutor(parallel) as pool:
            while True:
                yield from pool.map(
                    lambda path: len(read_video(path, short_side=256).frames), paths
                )

    return run


def deliver(make, paths, parallel, **kwargs):
    records = [VideoRecord(str(path), (0,)) for path in paths]
    dataset = make(
        records, 1, batch_size=2, fps=12.0, num_parallel_calls=parallel, **kwargs
    )

    def run():
        for batch in dataset.repeat():
            clips = batch["clips"] if isinstance(batch, dict) else batch[0]
            yield clips.shape[0] * clips.shape[1]

    return run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each figure")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = arguments.paths
        if not paths:
            path = Path(folder) / "video.mp4"
            make_video(path)
            # Hard links: as many files as are read at once.
            paths = [path.with_name(f"{index}.mp4") for index in range(8)]
            for link in paths:
                os.link(path, link)
        rows = []
        for parallel in arguments.parallel:
            jobs = {
                "decode": decode_only(paths[:parallel], parallel),
                "training_clips": deliver(training_clips, paths, parallel),
                "evaluation_segments": deliver(evaluation_segments, paths, parallel),
            }
            for name, job in jobs.items():
                rate, cores = measure(job, arguments.seconds)
                rows.append(
                    {
                        "what": name,
                        "files_at_once": parallel,
                        "frames_per_second": round(rate, 1),
                        "cores": round(cores, 2),
                        "frames_per_core_second": round(rate / cores, 1),
                    }
                )
                print(
                    f"{name:20} {parallel} at once: {rate:8.1f} frames/s, "
                    f"{cores:4.2f} cores, {rate / cores:7.1f} frames a core-second",
                    flush=True,
                )
    result = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_at_the_end": os.getloadavg()[0],
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
