"""Pictures of a memory map: on a terminal, as PNG, SVG or HTML."""
