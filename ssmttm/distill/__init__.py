"""Knowledge distillation: losses, layer mapping, weight transfer and the frozen teacher."""
