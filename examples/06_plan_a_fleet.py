"""Plans four models on 8 to 16,384 H100s: what is legal, what it fills, what idles, and what to change where it isn't."""

from raytron import ConfigError, make_plan, presets
from raytron.plan.cluster import on_paper

GPUS = (8, 64, 512, 2048, 16384)
LAYOUTS = {
    "llama3_8b_8xh100": {"mesh.tp": 2, "memory.recompute": "selective"},
    "llama3_70b_64xh100": {"mesh.tp": 8, "mesh.pp": 4, "memory.recompute": "selective"},
    "llama3_405b_1024xh200": {
        "mesh.tp": 8,
        "mesh.pp": 16,
        "pipeline.schedule": "interleaved",
        "memory.recompute": "full",
    },
    "deepseek_v3_shaped_1024xh100": {"mesh.tp": 2, "mesh.pp": 16, "mesh.ep": 64, "memory.recompute": "full"},
}

for name, layout in LAYOUTS.items():
    model = presets.find(name).replace(**layout)
    print(f"\n{name}: {', '.join(f'{key}={value}' for key, value in layout.items())}")
    for gpus in GPUS:
        dp = max(1, gpus // (model.mesh.tp * model.mesh.pp))
        config = model.replace(
            **{"mesh.dp": dp, "global_batch_size": 512 if gpus < 1024 else max(2048, model.global_batch_size)}
        )
        try:
            plan = make_plan(config, on_paper(f"{gpus}xH100"))
        except ConfigError as error:
            for problem in error.problems:
                print(f"{gpus:6}  no: {problem.what}; {problem.remedy}")
            continue
        fullest = plan.memory.largest / 2**30
        verdict = "; ".join(plan.warnings) or "fits"
        print(f"{gpus:6}  {plan.mesh}, bubble {100 * plan.bubble:.1f} %, fullest rank {fullest:.1f} GiB: {verdict}")
