"""Kernels: noise, perturbation, update, and all of them in one pass.

They can be used alone: ``examples/mezo_loop.py`` is a MeZO loop for a resident model in twenty
lines. The direction z is never stored. It is a pure function of ``(key, tensor_id, element)`` with
the same bits on every CPU and GPU, independent of threads, slices and order (docs/contracts.md,
"Noise, version 1").

Weights are float32, bfloat16 or float16, on the CPU or a CUDA device; arithmetic is float32. Stored
weights may also have 8 bits and share scales, or have 16 bits in two planes (`Packed`). CPU work
runs in torch's thread pool and is done on return. CUDA work is queued on the current stream of the
tensors' device and not waited for.
"""

from zo2ext._choices import Distribution as Distribution
from zo2ext._choices import Domain as Domain
from zo2ext._choices import Rounding as Rounding
from zo2ext.ops.build import cuda_built as cuda_built
from zo2ext.ops.fold import FoldSegment as FoldSegment
from zo2ext.ops.fold import fold as fold
from zo2ext.ops.fold import fold_table as fold_table
from zo2ext.ops.noise import direction_key as direction_key
from zo2ext.ops.noise import normal as normal
from zo2ext.ops.noise import rademacher as rademacher
from zo2ext.ops.packing import GROUP as GROUP
from zo2ext.ops.packing import Packed as Packed
from zo2ext.ops.packing import pack as pack
from zo2ext.ops.packing import pack_scaled as pack_scaled
from zo2ext.ops.packing import unpack as unpack
from zo2ext.ops.packing import unpack_scaled as unpack_scaled
from zo2ext.ops.tables import Direction as Direction
from zo2ext.ops.tables import Segment as Segment
from zo2ext.ops.tables import Update as Update
from zo2ext.ops.tables import segment_table as segment_table
from zo2ext.ops.tables import update_table as update_table
from zo2ext.ops.update import perturb_ as perturb_
from zo2ext.ops.update import update_ as update_
from zo2ext.ops.update import update_perturb as update_perturb
