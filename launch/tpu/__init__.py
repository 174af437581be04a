"""Starting a program on TPU pods: a queued resource by gcloud, or a JobSet on GKE."""
