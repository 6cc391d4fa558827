"""Pictures of measured figures, each drawn at the width at which it is shown, for light and dark themes."""
