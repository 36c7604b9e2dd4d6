"""Upload and download of datasets on the Hugging Face Hub: files, manifests, a card."""
