"""Notices images that use only the darkest part of their bit depth, such as 12 of 16 bits."""

FIRST_IMAGES = 100
DARK_SHARE = 1 / 8
"""Share of the range from which images are bright enough; 12 of 16 bits are 1/16."""


class RangeUse:
    """The brightest sample of the first images of more than 8 bits, as a share of their range."""

    def __init__(self) -> None:
        self.images = 0
        self.brightest = 0.0
        self._is_told = False

    def add(self, images: int, brightest: float) -> None:
        """Counts images of more than 8 bits; `brightest` is what the brightest of them uses."""
        if self.images < FIRST_IMAGES:
            self.images += images
            self.brightest = max(self.brightest, brightest)

    def warning(self, are_all: bool = False) -> str | None:
        """A line for the user, once, if the first images are dark.

        Args:
            are_all: whether no more images will come.
        """
        is_early = self.images < (1 if are_all else FIRST_IMAGES)
        if self._is_told or is_early or self.brightest >= DARK_SHARE:
            return None
        self._is_told = True
        levels = max(1, round(255 * self.brightest))
        return (
            f"the brightest of {self.images} images of more than 8 bits uses {self.brightest:.1%} of its "
            f"range: about {levels} grey levels are left. If the camera has fewer bits than the files, write "
            "MaxSampleValue (TIFF) or sBIT (PNG) into them, or scale them to the full range, and train anew"
        )
