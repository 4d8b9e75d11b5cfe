"""Masters and states that workers hold, by parameter, for state dicts."""

import torch


class Held:
    """Decoded once a bucket, as `optimizer` places and slices them; `write_back` encodes what was changed."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.decoded: dict[object, dict[str, torch.Tensor]] = {}

    def of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        bucket, _ = self.optimizer.places.get(parameter, (None, 0))
        if bucket is None or not bucket.flat.is_on_host:
            return {}
        if bucket not in self.decoded:
            names = self.optimizer.rule.state_names
            self.decoded[bucket] = {name: self.optimizer.read_state(bucket, name) for name in names}
            if bucket.flat.host.master is not None:
                self.decoded[bucket]["master"] = bucket.flat.values()
        return {name: self.optimizer.slice_of(parameter, values) for name, values in self.decoded[bucket].items()}

    def write_back(self) -> None:
        for bucket, states in self.decoded.items():
            for name, values in states.items():
                if name == "master":
                    bucket.flat.set_values(values)
                else:
                    self.optimizer.write_state(bucket, name, values)
