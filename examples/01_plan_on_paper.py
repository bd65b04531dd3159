"""Plans a run on hardware that need not be there: mesh, stages, schedule, bytes per rank, FLOPs. No device is touched."""

import sys

from raytron import presets
from raytron.plan.plan import make_plan

config = presets.find(sys.argv[1] if len(sys.argv) > 1 else "llama3_70b_64xh100")
print(make_plan(config, cluster=None))

interleaved = config.replace(**{"pipeline.schedule": "interleaved", "pipeline.virtual_stages": 2})
if config.mesh.pp > 1:
    before, after = make_plan(config, None), make_plan(interleaved, None)
    print(f"\ninterleaved in two chunks: bubble {100 * before.bubble:.1f} % -> {100 * after.bubble:.1f} %")
