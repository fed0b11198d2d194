"""SmolLM2-8x135M: Remoe's default model, an upcycled SmolLM2-135M-Instruct with eight experts a layer."""
