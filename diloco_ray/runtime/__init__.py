"""The real world: Ray actors, their placement, and the driver. The only room that imports ray."""
