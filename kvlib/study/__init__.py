"""Many cells, resumable: a grid planned, decoded, timed, drawn, verified."""
