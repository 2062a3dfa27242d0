"""From one attention mechanism to another, on the weights alone: no model class is imported here."""
