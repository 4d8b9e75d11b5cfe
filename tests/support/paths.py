"""Where the checkout lies, and the shared material beside it, which a checkout alone has not."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
