"""Lloyd's iteration by FAISS, on a CPU or on one GPU."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from semdict.pipeline.kmeans.torch_engine import Curves, lloyd

# Trains on the GPU whose number it is given, in a process of its own: builds without kernels for a GPU may abort.
GPU_TRIAL = """
import sys, numpy, faiss
if faiss.get_num_gpus() <= int(sys.argv[1]):
    sys.exit("this build of FAISS has no GPU support")
config = faiss.GpuIndexFlatConfig()
config.device = int(sys.argv[1])
index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), 4, config)
parameters = faiss.ClusteringParameters()
parameters.niter, parameters.min_points_per_centroid = 1, 1
codes = numpy.eye(4, dtype=numpy.float16).view(numpy.uint8)
codec = faiss.IndexScalarQuantizer(4, faiss.ScalarQuantizer.QT_fp16)
faiss.Clustering(4, 2, parameters).train_encoded(codes, codec, index)
"""


def gpu_number(device: str) -> int:
    """The number of a CUDA device name, 0 for "cuda"."""
    return torch.device(device).index or 0


@cache
def faiss_gpu_error(number: int = 0) -> str:
    """Why FAISS cannot train on a GPU here, "" if it can; tried in a child process."""
    command = [sys.executable, "-c", GPU_TRIAL, str(number)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return ""
    return (child.stderr.strip().splitlines() or [f"the trial ended with status {child.returncode}"])[-1][:200]


def faiss_lloyd(
    sample_ND: np.ndarray, start_KD: np.ndarray, iterations: int, devices: Sequence[str]
) -> tuple[np.ndarray, Curves]:
    """Centroids (K, D) float32 and the curves of a sample (N, D) of float32, or of float16, which is decoded by blocks.

    The first of `devices` is used, "cpu" or a GPU, and no other. A float16 sample is never copied as a whole.
    """
    import faiss

    points, width = sample_ND.shape
    k = len(start_KD)
    if points == k:  # FAISS would copy the points and report no iteration
        return lloyd(sample_ND, start_KD, iterations, ["cpu"])
    parameters = faiss.ClusteringParameters()
    parameters.niter, parameters.min_points_per_centroid = iterations, 1
    parameters.max_points_per_centroid = points // k + 1  # the sample is drawn already
    clustering = faiss.Clustering(width, k, parameters)
    faiss.copy_array_to_vector(start_KD.ravel(), clustering.centroids)
    index = _index(width, devices[0])
    if sample_ND.dtype == np.float16:
        codec = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16)
        clustering.train_encoded(sample_ND.view(np.uint8), codec, index)
    else:
        clustering.train(sample_ND, index)
    stats = [clustering.iteration_stats.at(i) for i in range(clustering.iteration_stats.size())]
    curves = Curves(
        [step.obj / points for step in stats],
        [int(step.nsplit) for step in stats],
        [step.imbalance_factor for step in stats],
    )
    return faiss.vector_to_array(clustering.centroids).reshape(k, width).copy(), curves


def _index(width: int, device: str):
    """An index of squared distances on the device."""
    import faiss

    if not device.startswith("cuda"):
        return faiss.IndexFlatL2(width)
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu_number(device)
    return faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), width, config)
