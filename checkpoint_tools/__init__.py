"""Commands on checkpoints: import, export, reshard, inspect, verify."""

from megatron_anymal.log_filters import quiet_libraries

# Before a command's own imports: some libraries print or log on import.
quiet_libraries()
