import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.confluent.parallelconsumer.ParallelConsumerOptions;
import io.confluent.parallelconsumer.ParallelConsumerOptions.ProcessingOrder;
import io.confluent.parallelconsumer.ParallelStreamProcessor;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/** Confluent's parallel-consumer, plain engine, key order: one blocking call for each message. */
public class Peer {
    record Person(String name, int age, long began_us, long ended_us) {}

    static final ObjectMapper JSON = new ObjectMapper();
    static final Map<String, String> ENV = System.getenv();

    public static void main(String[] arguments) throws Exception {
        var options = ParallelConsumerOptions.<String, String>builder()
                .ordering(ProcessingOrder.KEY)
                .maxConcurrency(Integer.parseInt(ENV.get("BENCH_SLOTS")))
                .consumer(new KafkaConsumer<>(consumer()))
                .producer(new KafkaProducer<>(producer()))
                .build();
        ParallelStreamProcessor<String, String> engine =
                ParallelStreamProcessor.createEosStreamProcessor(options);
        engine.subscribe(List.of(ENV.get("BENCH_INPUT")));
        HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        engine.pollAndProduce(context -> {
            var message = context.getSingleConsumerRecord();
            return new ProducerRecord<>(
                    ENV.get("BENCH_OUTPUT"), message.key(), extract(http, message.value()));
        });
        new CountDownLatch(1).await();
    }

    static String extract(HttpClient http, String text) {
        try {
            var body = JSON.createObjectNode().put("model", "bench").put("max_tokens", 1024);
            var messages = body.putArray("messages");
            messages.addObject().put("role", "system").put("content", ENV.get("BENCH_INSTRUCTIONS"));
            messages.addObject().put("role", "user").put("content", text);
            var request = HttpRequest.newBuilder(URI.create(ENV.get("BENCH_URL") + "/chat/completions"))
                    .header("Content-Type", "application/json")
                    .header("Authorization", "Bearer bench")
                    .POST(HttpRequest.BodyPublishers.ofByteArray(JSON.writeValueAsBytes(body)))
                    .build();
            var response = http.send(request, HttpResponse.BodyHandlers.ofByteArray());
            JsonNode answer = JSON.readTree(response.body());
            String content = answer.at("/choices/0/message/content").asText();
            return JSON.writeValueAsString(validated(content));
        } catch (Exception failure) {
            throw new RuntimeException(failure);
        }
    }

    static Object validated(String content) throws Exception {
        JsonNode found = JSON.readTree(content);
        if (found.has("records")) {
            return JSON.readValue(JSON.writeValueAsBytes(found.get("records")), Person[].class);
        }
        return JSON.treeToValue(found, Person.class);
    }

    static Properties consumer() {
        var properties = new Properties();
        properties.put("bootstrap.servers", ENV.get("BENCH_SERVERS"));
        properties.put("group.id", ENV.get("BENCH_GROUP"));
        properties.put("auto.offset.reset", "earliest");
        properties.put("enable.auto.commit", "false");
        properties.put("key.deserializer", StringDeserializer.class.getName());
        properties.put("value.deserializer", StringDeserializer.class.getName());
        return properties;
    }

    static Properties producer() {
        var properties = new Properties();
        properties.put("bootstrap.servers", ENV.get("BENCH_SERVERS"));
        properties.put("acks", "all");
        properties.put("linger.ms", "5");
        properties.put("key.serializer", StringSerializer.class.getName());
        properties.put("value.serializer", StringSerializer.class.getName());
        return properties;
    }
}
