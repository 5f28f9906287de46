"""Train a network of one level that has the option --wider for a step; print what arrived in it, in its model file and
in an older one."""
import functools
import json

import modules
import train

train.UNet = functools.partial(modules.UNet, dim_mults=(1,))
train.main(["--demo", "--max-steps", "1", "--dim", "16", "--batch-size", "4", "--wider", "0.5", "--ckpt-path", "runs"])
network, _, settings = modules.load_model("runs/demo64/model.safetensors")
old, _, _ = modules.load_model("oasis64.safetensors")
print(json.dumps([network.wider, settings["wider"], old.wider]))
