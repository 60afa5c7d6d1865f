"""What deploys is checked before it deploys: Serve configs, KubeRay manifests, cluster-launcher files, without a cluster."""
