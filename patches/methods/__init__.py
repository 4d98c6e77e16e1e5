"""All patch methods by name. A new method is a file in this folder and a line in `METHODS`."""

from patches.method import Patch
from patches.methods.depthwise import Depthwise
from patches.methods.dtl import DTL, DTLPlus, DTLPlusStar
from patches.methods.full import Full
from patches.methods.last_layer import LastLayer
from patches.methods.mist import Mist
from patches.methods.norm_statistics import NormStatistics
from patches.methods.parasite import Parasite
from patches.methods.scale_bias import ScaleBias
from patches.methods.shared import Shared

METHODS: dict[str, type[Patch]] = {
    "scale_bias": ScaleBias,
    "depthwise": Depthwise,
    "last_layer": LastLayer,
    "norm_statistics": NormStatistics,
    "full": Full,
    "shared": Shared,
    "dtl": DTL,
    "dtl_plus": DTLPlus,
    "dtl_plus_star": DTLPlusStar,
    "mist": Mist,
    "parasite": Parasite,
}
"""Name of the method -> its class. `patches.attach` takes these names."""
