"""How the shards of a set get made: here one after the other, by torchrun's processes, on Ray, or under Slurm."""
