"""The compared variants: the settings of each row of the papers' tables."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One row: its name in file names, its title in the paper, the objective and the `section.key=value` changes.

    paper: name of a score -> the number printed in the paper, at ImageNet scale.
    """

    name: str
    title: str
    objective: str
    changes: tuple[str, ...] = ()
    paper: dict[str, float] = field(default_factory=dict)


def paper(probe: float, fid: float, inception: float) -> dict[str, float]:
    """Linear-probe accuracy in per cent, FID and Inception score as printed in the paper."""
    return {"probe": probe, "fid": fid, "is": inception}


REC = "pretrain.lambda=0"  # LEASE's model without its contrast
SIDE = "pretrain.lease.contrast={}"
NEIGHBOURS = "pretrain.lease.neighbours={}"

# LEASE, ablation of components on ImageNet-1k (ViT-B); Sorcen's row is from the main table, at 1,600 epochs.
COMPONENTS = (
    Variant("rec", "reconstruction only", "lease", (REC,), paper(73.62, 10.62, 79.59)),
    Variant("lease", "LEASE: contrast on the encoder", "lease", (), paper(76.11, 10.35, 86.71)),
    Variant("decoder", "contrast on the decoder", "lease", (SIDE.format("decoder"),), paper(74.20, 10.97, 78.73)),
    Variant("both", "contrast on both", "lease", (SIDE.format("both"),), paper(76.07, 10.36, 84.33)),
    Variant("sorcen", "Sorcen: echo contrast", "sorcen", (), paper(75.1, 9.61, 90.96)),
)

# LEASE, table B.7b: number of neighbours (IN200, 200 epochs); "lease" is the row with 5.
NEIGHBOUR_COUNTS = (
    Variant("neighbours-0", "0", "lease", (NEIGHBOURS.format(0),)),
    Variant("lease", "5", "lease", (), paper(85.47, 16.33, 58.11)),
    Variant("neighbours-15", "15", "lease", (NEIGHBOURS.format(15),), paper(85.50, 16.80, 57.25)),
    Variant("neighbours-30", "30", "lease", (NEIGHBOURS.format(30),), paper(85.36, 16.31, 58.29)),
)


def printed(psnr: float, rfid: float, gfid: float, unguided: float, first_10: float, first_256: float) -> dict:
    """A row of VCQ's tables 4 and 6; probes are top-1 in per cent."""
    probes = {"first_10": first_10, "first_256": first_256}
    return {"psnr": psnr, "rfid": rfid, "gfid": gfid, "gfid_unguided": unguided, **probes}


SCHEDULE = "vcq.schedule={}"
SCHEDULES = (
    Variant(
        "constant", "constant", "vcq", (SCHEDULE.format("constant"),), printed(20.67, 2.26, 6.43, 27.98, 27.12, 48.02)
    ),
    Variant("linear", "linear", "vcq", (SCHEDULE.format("linear"),), printed(20.35, 2.42, 5.32, 14.70, 31.24, 46.60)),
    Variant("cosine", "cosine", "vcq", (SCHEDULE.format("cosine"),), printed(20.02, 2.77, 4.79, 14.80, 43.77, 48.79)),
    Variant("power", "power 2.5", "vcq", (SCHEDULE.format("power"),), printed(19.82, 2.89, 5.14, 16.19, 49.42, 46.93)),
)
