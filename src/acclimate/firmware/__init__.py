"""From a plan to a board: exporting a C project, building it, and running it on an emulated board."""
