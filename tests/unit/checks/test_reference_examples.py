"""Configurations known to be good that look otherwise than ours, in the shapes of Serve's and KubeRay's guides: no alarm."""

from __future__ import annotations

import pytest

from tests.unit.checks.conftest import Check

SERVE = """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000, request_timeout_s: 120, keep_alive_timeout_s: 90}
grpc_options:
  port: 9000
  grpc_servicer_functions: []
logging_config: {encoding: JSON, log_level: INFO, enable_access_log: true}
applications:
  - name: clip
    route_prefix: /clip
    import_path: fmray.serving.deploy:app
    args: {checkpoint: runs/clip}
    runtime_env:
      env_vars: {OMP_NUM_THREADS: "4"}
    deployments:
      - name: Model
        max_ongoing_requests: 128
        max_queued_requests: 512
        backpressure_config: {status_code: 429, retry_after_s: 1}
        graceful_shutdown_timeout_s: 30
        health_check_period_s: 10
        health_check_timeout_s: 30
        max_replicas_per_node: 8
        user_config: {batch: {max_items: 64, wait_ms: 3}}
        ray_actor_options: {num_cpus: 4, num_gpus: 0.5, memory: 8589934592}
        autoscaling_config:
          min_replicas: 1
          initial_replicas: 1
          max_replicas: 8
          target_ongoing_requests: 48
          look_back_period_s: 30
          upscale_delay_s: 10
          downscale_delay_s: 300
          upscaling_factor: 1.0
          aggregation_function: mean
  - name: vqa
    route_prefix: /vqa
    import_path: fmray.serving.deploy:app
    args: {checkpoint: runs/vqa}
    deployments:
      - name: Model
        max_ongoing_requests: 32
        max_queued_requests: 128
        autoscaling_config:
          min_replicas: 0
          max_replicas: 4
          target_ongoing_requests: 12
          upscale_delay_s: 10
          downscale_delay_s: 600
          downscale_to_zero_delay_s: 1800
        max_surge_percent: 0
        ray_actor_options: {num_cpus: 4, num_gpus: 1}
"""

POD = """
          containers:
            - name: ray
              image: rayproject/ray:2.60.0-py311-gpu
              env:
                - {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
                - {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
              resources:
                requests: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "1"}
                limits: {cpu: "8", memory: 32Gi, nvidia.com/gpu: "1"}"""

RAY_SERVICE = f"""
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: fmray
  annotations: {{ray.io/initializing-timeout: "30m"}}
spec:
  rayClusterDeletionDelaySeconds: 120
  excludeHeadPodFromServeSvc: true
  upgradeStrategy: {{type: NewCluster}}
  serveConfigV2: |
    proxy_location: EveryNode
    http_options: {{host: 0.0.0.0, port: 8000, request_timeout_s: 120}}
    applications:
      - name: clip
        route_prefix: /
        import_path: fmray.serving.deploy:app
        args: {{checkpoint: runs/clip}}
        deployments:
          - name: Model
            max_ongoing_requests: 128
            max_queued_requests: 512
            max_replicas_per_node: 1
            ray_actor_options: {{num_cpus: 4, num_gpus: 1}}
            autoscaling_config: {{min_replicas: 1, max_replicas: 4, target_ongoing_requests: 48}}
  rayClusterConfig:
    rayVersion: "2.60.0"
    enableInTreeAutoscaling: true
    autoscalerOptions: {{version: v2, idleTimeoutSeconds: 300, upscalingMode: Default}}
    authOptions: {{mode: token, secretName: fmray-ray-token}}
    gcsFaultToleranceOptions:
      redisAddress: "redis:6379"
      redisPassword:
        valueFrom:
          secretKeyRef: {{name: redis-password, key: password}}
    headGroupSpec:
      rayStartParams: {{num-cpus: "0", num-gpus: "0", dashboard-host: 0.0.0.0}}
      template:
        spec:{POD}
    workerGroupSpecs:
      - groupName: gpu
        replicas: 1
        minReplicas: 1
        maxReplicas: 4
        rayStartParams: {{}}
        template:
          metadata:
            labels: {{team: vision, name: anything}}
          spec:
            terminationGracePeriodSeconds: 120{POD.replace(chr(10), chr(10) + "  ")}
"""

RAY_JOB = f"""
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: fmray-train-clip
spec:
  entrypoint: python -m jobs.pretrain --config /cfg/train.yaml
  submissionMode: K8sJobMode
  backoffLimit: 2
  activeDeadlineSeconds: 86400
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 600
  runtimeEnvYAML: |
    working_dir: "https://example.org/code.zip"
    env_vars: {{RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S: "300"}}
  rayClusterSpec:
    rayVersion: "2.60.0"
    authOptions: {{mode: token}}
    headGroupSpec:
      rayStartParams: {{num-cpus: "0"}}
      template:
        spec:{POD}
    workerGroupSpecs:
      - groupName: gpu
        replicas: 2
        minReplicas: 2
        maxReplicas: 8
        rayStartParams: {{}}
        template:
          spec:{POD.replace(chr(10), chr(10) + "  ")}
"""

LAUNCHER = """
cluster_name: fmray
max_workers: 8
docker:
  image: rayproject/ray:2.60.0-py311-gpu
  container_name: ray_container
  run_options: ["--ulimit nofile=65536:65536"]
provider: {type: aws, region: us-west-2, cache_stopped_nodes: false}
auth: {ssh_user: ubuntu}
available_node_types:
  head: {resources: {CPU: 0}, node_config: {InstanceType: m6i.2xlarge}}
  gpu: {min_workers: 0, max_workers: 8, resources: {CPU: 16, GPU: 1, scanner: 2}, node_config: {InstanceType: g6.4xlarge}}
head_node_type: head
file_mounts: {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
setup_commands: ["pip install fmray==0.1.0"]
"""

ON_PREMISE = """
cluster_name: fmray
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}
auth: {ssh_user: ubuntu, ssh_private_key: ~/.ssh/id_ed25519}
"""

GOOGLE = """
cluster_name: fmray
max_workers: 2
provider: {type: gcp, region: us-west1, availability_zone: us-west1-a, project_id: null}
auth: {ssh_user: ubuntu}
available_node_types:
  head:
    resources: {CPU: 2}
    node_config: {machineType: n1-standard-2}
  worker:
    min_workers: 1
    max_workers: 2
    resources: {CPU: 2}
    node_config:
      machineType: n1-standard-2
      scheduling: [{preemptible: true}]
head_node_type: head
"""


@pytest.mark.parametrize(
    "text",
    [SERVE, RAY_SERVICE, RAY_JOB, LAUNCHER, ON_PREMISE, GOOGLE, f"{RAY_JOB}---{RAY_SERVICE}"],
    ids=["serve", "service", "job", "aws", "local", "gcp", "two documents"],
)
def test_good_files_raise_no_alarm(text: str, check: Check) -> None:
    assert [str(finding) for finding in check(text)] == []


def test_anchors_and_merge_keys_are_read_as_yaml_reads_them(check: Check) -> None:
    text = SERVE.replace(
        "ray_actor_options: {num_cpus: 4, num_gpus: 0.5, memory: 8589934592}",
        "ray_actor_options: &actor {num_cpus: 4}",
    )
    text = text.replace(
        "ray_actor_options: {num_cpus: 4, num_gpus: 1}", "ray_actor_options: {<<: *actor, num_gpus: 1}"
    )
    assert check(text) == []
    (finding,) = check(text.replace("{num_cpus: 4}", "{num_cpus: -4}"))[:1]
    assert finding.problem == "is -4"
