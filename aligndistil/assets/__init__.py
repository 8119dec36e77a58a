"""The embedded default: `builtin:tiny` (a model folder) and `builtin:reviews` (preference pairs). See README.md."""
