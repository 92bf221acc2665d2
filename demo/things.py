"""The things that the demo's images show, each drawn by one function; THINGS lists them in label order.

Coordinates: a thing stands on (0, 0), x grows to the right, y upwards; it is about 2 units high and wide. Colours are
RGB, 0 .. 255.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]

RED, ORANGE, YELLOW, GREEN = (200, 52, 48), (228, 132, 46), (240, 200, 62), (66, 132, 60)
BLUE, VIOLET, BROWN, GREY = (58, 104, 186), (134, 82, 164), (122, 84, 56), (128, 130, 136)
WHITE, DARK, GLASS = (240, 240, 236), (44, 46, 56), (150, 190, 214)
PAINTS = (RED, ORANGE, YELLOW, GREEN, BLUE, VIOLET, BROWN, GREY, WHITE, DARK)


class Brush:
    """Draws polygons and ellipses in a thing's coordinates on a transparent canvas of `side` pixels."""

    def __init__(self, side: int, foot: tuple[float, float], scale: tuple[float, float]) -> None:
        """foot: pixel (x, y) of the thing's (0, 0); scale: pixels per unit along x (negative mirrors) and y."""
        self.image = Image.new("RGBA", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.foot, self.scale = foot, scale

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        return self.foot[0] + self.scale[0] * x, self.foot[1] - self.scale[1] * y

    def polygon(self, colour: Colour, *points: tuple[float, float]) -> None:
        """A filled polygon."""
        self.draw.polygon([self.point(*p) for p in points], fill=_rgba(colour))

    def box(self, colour: Colour, left: float, bottom: float, right: float, top: float) -> None:
        """A filled rectangle."""
        self.polygon(colour, (left, bottom), (right, bottom), (right, top), (left, top))

    def oval(self, colour: Colour, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """A filled ellipse around (x, y)."""
        ry = rx if ry is None else ry
        (x0, y0), (x1, y1) = self.point(x - rx, y + ry), self.point(x + rx, y - ry)
        self.draw.ellipse([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], fill=_rgba(colour))

    def rgba(self, shrink: int) -> np.ndarray:
        """(side / shrink, side / shrink, 4) float32: colours times the covered share of the pixel, and that share."""
        pixels = np.asarray(self.image.convert("RGBa").reduce(shrink), dtype=np.float32)
        return pixels / np.float32([1, 1, 1, 255])


def _rgba(colour: Colour) -> tuple[int, ...]:
    return (*(int(min(max(c, 0), 255)) for c in colour), 255)


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (factor < 1) or lighter colour."""
    return tuple(c * factor for c in colour)


def paint(rng: np.random.Generator, usual: Sequence[Colour], exceptions: float = 0.5) -> Colour:
    """One of the usual colours, rarely any other, slightly varied."""
    pool = PAINTS if rng.random() < exceptions else usual
    return tuple(np.array(pool[rng.integers(len(pool))]) + rng.normal(0, 9, 3))


def house(b: Brush, rng: np.random.Generator) -> None:
    """Walls, gable roof, chimney, door, window."""
    wall, roof = paint(rng, [WHITE, YELLOW, ORANGE]), paint(rng, [RED, BROWN])
    if rng.random() < 0.7:
        b.box(shade(roof, 0.7), 0.4, 1.2, 0.65, 1.95)
    b.box(wall, -0.9, 0, 0.9, 1.1)
    b.polygon(roof, (-1.1, 1.05), (1.1, 1.05), (0.0, 1.95))
    b.box(shade(roof, 0.6), -0.65, 0, -0.2, 0.75)
    b.box(GLASS if rng.random() < 0.7 else DARK, 0.1, 0.4, 0.65, 0.85)


def tree(b: Brush, rng: np.random.Generator) -> None:
    """A trunk under a crown of three balls."""
    crown = paint(rng, [GREEN, GREEN, shade(GREEN, 0.8), ORANGE])
    b.box(paint(rng, [BROWN], 0.3), -0.16, 0, 0.16, 1.0)
    b.oval(shade(crown, 0.8), -0.42, 1.15, 0.52)
    b.oval(shade(crown, 0.9), 0.42, 1.15, 0.52)
    b.oval(crown, 0.0, 1.5, 0.58)


def mushroom(b: Brush, rng: np.random.Generator) -> None:
    """A pale stem under a half round cap with dots."""
    cap = paint(rng, [RED, RED, BROWN])
    b.polygon(paint(rng, [WHITE], 0.3), (-0.34, 0), (0.34, 0), (0.22, 1.0), (-0.22, 1.0))
    angles = np.linspace(0, np.pi, 24)
    b.polygon(cap, *zip(1.0 * np.cos(angles), 0.85 + 0.95 * np.sin(angles), strict=True))
    b.oval(shade(cap, 0.65), 0, 0.86, 1.0, 0.14)
    for x, y in ((-0.5, 1.2), (0.08, 1.5), (0.56, 1.15)):
        b.oval(WHITE, x, y, 0.15, 0.13)


def flower(b: Brush, rng: np.random.Generator) -> None:
    """A stem with two leaves and a ring of petals."""
    petals = paint(rng, [RED, YELLOW, WHITE, VIOLET])
    b.box(GREEN, -0.07, 0, 0.07, 1.2)
    b.polygon(GREEN, (0, 0.3), (0.45, 0.7), (0.62, 0.62), (0.4, 0.35))
    b.polygon(shade(GREEN, 0.85), (0, 0.2), (-0.45, 0.6), (-0.62, 0.52), (-0.4, 0.25))
    turn = rng.uniform(0, np.pi / 3)
    for angle in turn + np.arange(6) * np.pi / 3:
        b.oval(petals, 0.42 * np.cos(angle), 1.4 + 0.42 * np.sin(angle), 0.28)
    b.oval(paint(rng, [YELLOW, BROWN], 0), 0, 1.4, 0.26)


def boat(b: Brush, rng: np.random.Generator) -> None:
    """A hull with a mast and two sails."""
    sail = paint(rng, [WHITE, WHITE, ORANGE])
    b.box(BROWN, -0.06, 0.3, 0.04, 2.0)
    b.polygon(sail, (0.08, 0.5), (0.95, 0.5), (0.08, 1.95))
    b.polygon(shade(sail, 0.85), (-0.1, 0.5), (-0.7, 0.5), (-0.1, 1.7))
    b.polygon(paint(rng, [BROWN, RED, BLUE]), (-1.1, 0.4), (1.1, 0.4), (0.75, -0.1), (-0.75, -0.1))


def fish(b: Brush, rng: np.random.Generator) -> None:
    """An oval body with a tail, a fin, stripes and an eye."""
    body = paint(rng, [ORANGE, ORANGE, YELLOW, RED])
    b.polygon(shade(body, 0.8), (0.5, 1.0), (1.15, 1.5), (1.0, 1.0), (1.15, 0.5))
    b.polygon(shade(body, 0.8), (-0.3, 1.4), (0.35, 1.75), (0.35, 1.3))
    b.oval(body, -0.15, 1.0, 0.85, 0.5)
    b.polygon(WHITE, (-0.35, 1.46), (-0.2, 1.48), (-0.2, 0.52), (-0.35, 0.54))
    b.polygon(WHITE, (0.1, 1.42), (0.24, 1.38), (0.24, 0.62), (0.1, 0.58))
    b.oval(WHITE, -0.64, 1.1, 0.14)
    b.oval(DARK, -0.66, 1.1, 0.08)


def lighthouse(b: Brush, rng: np.random.Generator) -> None:
    """A tapering striped tower on a rock, with a lamp."""
    wall, stripe = paint(rng, [WHITE]), paint(rng, [RED, RED, BLUE])
    b.polygon(GREY, (-0.95, -0.1), (0.95, -0.1), (0.55, 0.25), (-0.6, 0.25))
    for k in range(5):
        low, high = 0.2 + 0.27 * k, 0.2 + 0.27 * (k + 1)
        at = [0.46 - 0.16 * (y - 0.2) for y in (low, high)]
        b.polygon(stripe if k % 2 else wall, (-at[0], low), (at[0], low), (at[1], high), (-at[1], high))
    b.box(DARK, -0.36, 1.5, 0.36, 1.58)
    b.box(YELLOW, -0.2, 1.58, 0.2, 1.82)
    b.polygon(stripe, (-0.3, 1.8), (0.3, 1.8), (0, 2.1))


def cactus(b: Brush, rng: np.random.Generator) -> None:
    """A column with two bent arms."""
    skin = paint(rng, [GREEN, shade(GREEN, 0.8)])
    for side, low, high in ((-1, 0.75, 1.35), (1, 0.5, 1.2)):
        b.box(shade(skin, 0.85), *sorted((side * 0.75, 0))[:1], low, max(side * 0.75, 0), low + 0.26)
        b.box(shade(skin, 0.85), min(side * 0.55, side * 0.82), low, max(side * 0.55, side * 0.82), high)
        b.oval(shade(skin, 0.85), side * 0.685, high, 0.135)
    b.box(skin, -0.25, 0, 0.25, 1.75)
    b.oval(skin, 0, 1.75, 0.25)
    if rng.random() < 0.4:
        b.oval(RED, 0, 2.0, 0.14)


def snowman(b: Brush, rng: np.random.Generator) -> None:
    """Three balls of snow with a hat, a nose, a scarf and buttons."""
    scarf, snow = paint(rng, [RED, BLUE, GREEN]), paint(rng, [WHITE], 0.3)
    b.oval(shade(snow, 0.9), 0, 0.5, 0.62, 0.55)
    b.oval(shade(snow, 0.97), 0, 1.1, 0.44, 0.4)
    b.oval(snow, 0, 1.58, 0.33)
    b.box(scarf, -0.33, 1.24, 0.33, 1.38)
    b.box(DARK, -0.42, 1.8, 0.42, 1.88)
    b.box(DARK, -0.26, 1.85, 0.26, 2.15)
    b.polygon(ORANGE, (0, 1.62), (0, 1.5), (0.4, 1.52))
    for x, y in ((-0.12, 1.68), (0.14, 1.68), (0, 1.1), (0, 0.75)):
        b.oval(DARK, x, y, 0.06)


def penguin(b: Brush, rng: np.random.Generator) -> None:
    """A dark body with a white belly, beak, wings and feet."""
    coat = paint(rng, [DARK, shade(BLUE, 0.6)])
    for x in (-0.28, 0.28):
        b.oval(ORANGE, x, 0.06, 0.24, 0.09)
    b.polygon(coat, (-0.5, 1.3), (-0.95, 0.55), (-0.8, 0.5), (-0.4, 0.8))
    b.polygon(coat, (0.5, 1.3), (0.95, 0.55), (0.8, 0.5), (0.4, 0.8))
    b.oval(coat, 0, 0.8, 0.62, 0.75)
    b.oval(coat, 0, 1.55, 0.42)
    b.oval(WHITE, 0, 0.7, 0.42, 0.58)
    b.oval(WHITE, 0.02, 1.5, 0.3, 0.26)
    for x in (-0.13, 0.17):
        b.oval(DARK, x, 1.6, 0.07)
    b.polygon(ORANGE, (-0.12, 1.48), (0.16, 1.48), (0.02, 1.28))


def car(b: Brush, rng: np.random.Generator) -> None:
    """A body with a cabin, two windows and two wheels."""
    body = paint(rng, [RED, BLUE, YELLOW, GREY])
    b.polygon(shade(body, 0.9), (-0.75, 0.75), (0.65, 0.75), (0.35, 1.3), (-0.45, 1.3))
    b.polygon(GLASS, (-0.6, 0.78), (-0.08, 0.78), (-0.08, 1.2), (-0.4, 1.2))
    b.polygon(GLASS, (0.02, 0.78), (0.52, 0.78), (0.3, 1.2), (0.02, 1.2))
    b.polygon(body, (-1.2, 0.25), (1.2, 0.25), (1.2, 0.65), (0.9, 0.8), (-1.1, 0.8), (-1.2, 0.7))
    b.oval(YELLOW, 1.1, 0.58, 0.1)
    for x in (-0.65, 0.65):
        b.oval(DARK, x, 0.26, 0.3)
        b.oval(GREY, x, 0.26, 0.14)


def balloon(b: Brush, rng: np.random.Generator) -> None:
    """A striped envelope over a basket on ropes."""
    first, second = paint(rng, [RED, ORANGE, VIOLET, BLUE]), paint(rng, [YELLOW, WHITE])
    b.polygon(BROWN, (-0.3, 0.3), (-0.26, 0.3), (-0.5, 0.9), (-0.56, 0.9))
    b.polygon(BROWN, (0.3, 0.3), (0.26, 0.3), (0.5, 0.9), (0.56, 0.9))
    b.polygon(first, (-0.75, 1.0), (0.75, 1.0), (0.26, 0.48), (-0.26, 0.48))
    b.oval(first, 0, 1.4, 0.86, 0.72)
    b.oval(second, 0, 1.4, 0.55, 0.72)
    b.polygon(second, (-0.46, 1.05), (0.46, 1.05), (0.16, 0.48), (-0.16, 0.48))
    b.oval(first, 0, 1.4, 0.22, 0.72)
    b.polygon(first, (-0.18, 1.05), (0.18, 1.05), (0.07, 0.48), (-0.07, 0.48))
    b.box(BROWN, -0.24, 0.05, 0.24, 0.34)


THINGS: dict[str, Callable[[Brush, np.random.Generator], None]] = {
    thing.__name__: thing
    for thing in (balloon, boat, cactus, car, fish, flower, house, lighthouse, mushroom, penguin, snowman, tree)
}
