"""The page of ``ditscale serve``: its fields, the views of images at work, and the server. Gradio is imported here."""
